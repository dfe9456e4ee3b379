//! Test bed: hosts in network namespaces, guests, faults, checking clients.
