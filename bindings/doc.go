// Package bindings is a ZeroTier node on libzt, through cgo (build tag libzt).
// It uses the core functions that libzt exports, not its sockets, so that whole
// Ethernet frames go in and out as in package zerotier (chapter 05). Both say what
// there is to know of a node in the words of package ztnode.
//
// The caller gives the UDP service. Datagrams and frames cross into C in
// batches: each goroutine has a batch in C memory into which it copies what goes
// in, and from which it sends and delivers what the core's callbacks put there.
// Callbacks only copy, since the core holds locks while it calls them (chapter
// 05 §8.2).
//
// Without the build tag the package is empty.
package bindings
