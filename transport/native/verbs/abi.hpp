// What this program uses of libibverbs' binary interface, so that neither building nor importing needs its headers.
// Source: the public interface of libibverbs.so.1 (IBVERBS_1.1), which rdma-core keeps stable; tests compare sizes,
// offsets and values with <infiniband/verbs.h> where that is installed.
#pragma once

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

namespace mf::ibv {

struct Device;
struct Pd;
struct Context;

enum PortState { kPortActive = 4 };
enum LinkLayer { kLinkUnspecified = 0, kLinkInfiniband = 1, kLinkEthernet = 2 };
enum QpState { kReset = 0, kInit = 1, kReadyToReceive = 2, kReadyToSend = 3 };
enum QpType { kReliableConnection = 2 };
enum Access { kLocalWrite = 1, kRemoteWrite = 2, kRemoteRead = 4 };
enum Opcode { kRdmaWrite = 0, kRdmaRead = 4 };
enum SendFlags { kSignaled = 1 << 1 };
enum WcStatus {
    kSuccess = 0,
    kFlushed = 5,
    kRemoteInvalidRequest = 9,
    kRemoteAccess = 10,
    kRemoteOperation = 11,
    kRetryExceeded = 12,
};
enum AttrMask {
    kState = 1 << 0,
    kAccessFlags = 1 << 3,
    kPkeyIndex = 1 << 4,
    kPort = 1 << 5,
    kAv = 1 << 7,
    kPathMtu = 1 << 8,
    kTimeout = 1 << 9,
    kRetryCnt = 1 << 10,
    kRnrRetry = 1 << 11,
    kRqPsn = 1 << 12,
    kMaxRdAtomic = 1 << 13,
    kMinRnrTimer = 1 << 15,
    kSqPsn = 1 << 16,
    kMaxDestRdAtomic = 1 << 17,
    kDestQpn = 1 << 20,
};

struct alignas(8) Gid {
    uint8_t raw[16];
};

struct GidEntry {
    Gid gid;
    uint32_t gid_index, port_num, gid_type, ndev_ifindex;
};

struct DeviceAttr {
    char fw_ver[64];
    uint64_t node_guid, sys_image_guid, max_mr_size, page_size_cap;
    uint32_t vendor_id, vendor_part_id, hw_ver;
    int max_qp, max_qp_wr;
    unsigned int device_cap_flags;
    int max_sge, max_sge_rd, max_cq, max_cqe, max_mr, max_pd, max_qp_rd_atom, max_ee_rd_atom, max_res_rd_atom,
        max_qp_init_rd_atom, max_ee_init_rd_atom, atomic_cap, max_ee, max_rdd, max_mw, max_raw_ipv6_qp,
        max_raw_ethy_qp, max_mcast_grp, max_mcast_qp_attach, max_total_mcast_qp_attach, max_ah, max_fmr,
        max_map_per_fmr, max_srq, max_srq_wr, max_srq_sge;
    uint16_t max_pkeys;
    uint8_t local_ca_ack_delay, phys_port_cnt;
};

struct PortAttr {
    int state, max_mtu, active_mtu, gid_tbl_len;
    uint32_t port_cap_flags, max_msg_sz, bad_pkey_cntr, qkey_viol_cntr;
    uint16_t pkey_tbl_len, lid, sm_lid;
    uint8_t lmc, max_vl_num, sm_sl, subnet_timeout, init_type_reply, active_width, active_speed, phys_state, link_layer,
        flags;
    uint16_t port_cap_flags2;
};

struct CompChannel {
    Context* context;
    int fd, refcnt;
};

struct Cq {
    Context* context;
    CompChannel* channel;  // more follows
};

struct Qp {
    Context* context;
    void* qp_context;
    Pd* pd;
    Cq *send_cq, *recv_cq;
    void* srq;
    uint32_t handle, qp_num;  // more follows
};

struct Mr {
    Context* context;
    Pd* pd;
    void* addr;
    size_t length;
    uint32_t handle, lkey, rkey;
};

struct Wc {
    uint64_t wr_id;
    int status, opcode;
    uint32_t vendor_err, byte_len, imm_data, qp_num, src_qp;
    unsigned int wc_flags;
    uint16_t pkey_index, slid;
    uint8_t sl, dlid_path_bits;
};

struct GlobalRoute {
    Gid dgid;
    uint32_t flow_label;
    uint8_t sgid_index, hop_limit, traffic_class;
};

struct AhAttr {
    GlobalRoute grh;
    uint16_t dlid;
    uint8_t sl, src_path_bits, static_rate, is_global, port_num;
};

struct QpCap {
    uint32_t max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data;
};

struct QpInitAttr {
    void* qp_context;
    Cq *send_cq, *recv_cq;
    void* srq;
    QpCap cap;
    int qp_type, sq_sig_all;
};

struct QpAttr {
    int qp_state, cur_qp_state, path_mtu, path_mig_state;
    uint32_t qkey, rq_psn, sq_psn, dest_qp_num;
    unsigned int qp_access_flags;
    QpCap cap;
    AhAttr ah_attr, alt_ah_attr;
    uint16_t pkey_index, alt_pkey_index;
    uint8_t en_sqd_async_notify, sq_draining, max_rd_atomic, max_dest_rd_atomic, min_rnr_timer, port_num, timeout,
        retry_cnt, rnr_retry, alt_port_num, alt_timeout;
    uint32_t rate_limit;
};

struct Sge {
    uint64_t addr;
    uint32_t length, lkey;
};

struct SendWr {
    uint64_t wr_id;
    SendWr* next;
    Sge* sg_list;
    int num_sge, opcode;
    unsigned int send_flags;
    uint32_t imm_data;
    uint64_t remote_addr;
    uint32_t rkey;
    uint8_t others[76];  // of atomics, datagrams, windows and offloads
};

struct ContextOps {
    void* before_poll[11];
    int (*poll_cq)(Cq*, int, Wc*);
    int (*req_notify_cq)(Cq*, int solicited_only);
    void* before_send[12];
    int (*post_send)(Qp*, SendWr*, SendWr** bad);
    void* after_send[6];
};

struct Context {
    Device* device;
    ContextOps ops;
    int cmd_fd, async_fd;  // more follows
};

}  // namespace mf::ibv
