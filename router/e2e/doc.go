// Package e2e tests the program as an operator runs it: in network namespaces,
// with real clients and, where ZT_ONE names one, with real zerotier-one peers.
// Its tests have the build tag e2e and need root; `make e2e` runs them, `make
// interop` those with real peers, also with an older zerotier-one (ZT_ONE_OLD), a
// newer one that can seal its HELLOs (ZT_ONE_NEW), a node in Go that others wrote behind the
// same command line and API (ZT_GO), a
// member on libzt (LIBZT_PREFIX) and a gateway on libzt (ZTGATE_LIBZT, a build that
// has it). Those end with a table of what was tried with what, which
// ZTGATE_E2E_TABLE names a file for. ZTGATE_E2E_PREFIX keeps several runs apart.
package e2e
