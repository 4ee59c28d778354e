// Package plane measures the forwarding plane in memory: nanoseconds and
// allocations a packet for established flows, new flows and short connections a
// second, memory a flow, and how long removal holds others up. gVisor's own
// MASQUERADE stands in the same table.
//
//	go test -bench . ./bench/plane
//
// Packets have 1,400 bytes. Between two passes only their headers are restored,
// so that what is measured is the plane and not the harness; to the VPC side the
// plane copies each packet once, which is part of the figure.
package plane
