// Package faults holds the loads and faults that need a whole gateway with its
// overlay: the rows LF-8 to LF-28 of docs/nat.md, and which flows survive a
// restart. They run `ztgate` in network namespaces and need root;
// the environment variable ZTGATE is the path of the program. `make conformance`
// runs them.
package faults
