// Package faults holds the loads and faults that need a whole gateway with its
// overlay: rows of section 4 of the NAT behaviour table, LF-8 to LF-28, and which
// flows survive a restart. They run `ztgate` in network namespaces and need root;
// the environment variable ZTGATE is the path of the program. `make conformance`
// runs them.
package faults
