// Package conformance tests the forwarding plane from outside: raw players on
// both sides send packets and judge what comes out, one test per requirement of
// docs/nat.md (RFC 4787, 5382, 5508, 6888, 7857, 1812, 8200 and what users of Linux
// masquerade count on).
//
// TestConformance runs the rows on an engine in memory, on an injected clock. With
// the build tag e2e it also runs them on the kernel's nftables masquerade in
// network namespaces as a control, and real programs through the engine; both
// need root. The package has no code of its own besides its tests.
package conformance
