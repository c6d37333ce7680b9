"""What tests of memfabric, and of what is built on it, can use: hosts on one machine."""
