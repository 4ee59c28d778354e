// Package e2e tests the program as an operator runs it: in network namespaces,
// with real clients and, where ZT_ONE names one, with real zerotier-one peers.
// Its tests have the build tag e2e and need root; `make e2e` runs them.
package e2e
