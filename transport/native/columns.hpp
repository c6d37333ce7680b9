// Columns that come from Python: any object with the buffer protocol, checked for type, length and contiguity.
#pragma once

#include <nanobind/nanobind.h>

#include <string>
#include <type_traits>

namespace mf {

namespace nb = nanobind;

// A borrowed buffer, held for the length of a call.
class Buffer {
public:
    Buffer() = default;
    Buffer(nb::handle object, int flags) { acquire(object, flags); }
    ~Buffer() {
        if (held_) PyBuffer_Release(&view_);
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    void acquire(nb::handle object, int flags) {
        if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw nb::python_error();
        held_ = true;
    }
    bool held() const { return held_; }
    const Py_buffer& view() const { return view_; }
    uint8_t* data() const { return static_cast<uint8_t*>(view_.buf); }
    size_t size() const { return static_cast<size_t>(view_.len); }

private:
    Py_buffer view_;
    bool held_ = false;
};

// One column: a 1-D C-contiguous array of T. None leaves it absent.
template <typename T>
class Column {
public:
    void take(nb::handle object, const char* name, bool writable) {
        if (object.is_none()) return;
        buffer_.acquire(object, PyBUF_ND | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0));
        const Py_buffer& view = buffer_.view();
        const char* format = view.format == nullptr ? "B" : view.format;
        if (*format == '<' || *format == '=' || *format == '@') ++format;
        const bool kind = std::is_signed_v<T> ? (*format == 'i' || *format == 'l' || *format == 'q')
                                              : (*format == 'B' || *format == 'I' || *format == 'L' || *format == 'Q');
        if (view.ndim != 1 || view.itemsize != sizeof(T) || !kind || format[1] != '\0')
            throw nb::value_error((std::string("column ") + name + " must be a one-dimensional C-contiguous array of " +
                                   (std::is_signed_v<T> ? "int" : "uint") + std::to_string(8 * sizeof(T)))
                                      .c_str());
    }
    void take(nb::handle object, const char* name, bool writable, size_t count) {
        take(object, name, writable);
        if (!buffer_.held())
            throw nb::value_error((std::string("column ") + name + " is missing").c_str());
        check(name, count);
    }
    void check(const char* name, size_t count) const {
        if (size() != count)
            throw nb::value_error((std::string("column ") + name + " has " + std::to_string(size()) +
                                   " entries, expected " + std::to_string(count))
                                      .c_str());
    }
    bool held() const { return buffer_.held(); }
    T* data() const { return held() ? reinterpret_cast<T*>(buffer_.data()) : nullptr; }
    size_t size() const { return held() ? buffer_.size() / sizeof(T) : 0; }

private:
    Buffer buffer_;
};

}  // namespace mf
