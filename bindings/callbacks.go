//go:build libzt

package bindings

// #include "shim.h"
import "C"

import (
	"fmt"
	"maps"
	"net/netip"
	"runtime/cgo"
	"unsafe"

	"ztgate/zerotier/ztnode"
)

// The callbacks run on whatever thread is inside the core, with its locks held:
// they copy, and wake those who do the work. None calls the core or takes a lock
// that anybody holds while calling it.

// node returns the node of a handle, nil if it is gone.
func node(h C.uintptr_t) (n *Node) {
	defer func() {
		if recover() != nil { // a late thread, after the handle was deleted
			n = nil
		}
	}()
	if h == 0 {
		return nil
	}
	return cgo.Handle(h).Value().(*Node)
}

// guard keeps a panic from unwinding through the core, whose locks would stay
// held. The node ends because of it.
func (n *Node) guard() {
	if v := recover(); v != nil && n != nil {
		text := fmt.Sprint(v)
		n.fault.Store(&text)
	}
}

// stateID returns the object's place in the store. The core gives identities and
// planet IDs that play no part in file names.
func stateID(kind C.int, id C.uint64_t) (objectID, bool) {
	switch kind {
	case objPublic, objSecret, objPlanet:
		return objectID{int(kind), 0}, true
	case objMoon, objPeer, objNetwork:
		return objectID{int(kind), uint64(id)}, true
	}
	return objectID{}, false
}

//export goStatePut
func goStatePut(h C.uintptr_t, kind C.int, id C.uint64_t, data unsafe.Pointer, size C.int) {
	n := node(h)
	defer n.guard()
	o, ok := stateID(kind, id)
	if n == nil || !ok || size > maxObject {
		return
	}
	if size < 0 {
		n.store.put(o, nil)
		return
	}
	b := make([]byte, size)
	copy(b, unsafe.Slice((*byte)(data), size))
	n.store.put(o, b)
}

//export goStateGet
func goStateGet(h C.uintptr_t, kind C.int, id C.uint64_t, buf unsafe.Pointer, size C.uint) (got C.int) {
	n := node(h)
	defer n.guard()
	got = -1
	if o, ok := stateID(kind, id); ok && n != nil {
		got = C.int(n.store.get(o, unsafe.Slice((*byte)(buf), size)))
	}
	return got
}

// Operations of a configuration (chapter 05 §5.4).
const (
	opUp = iota + 1
	opUpdate
	opDown
	opDestroy
)

const statusOK = 1

//export goConfig
func goConfig(h C.uintptr_t, nwid C.uint64_t, op C.int, c *C.core_config) {
	n := node(h)
	defer n.guard()
	if n == nil || op == opDown {
		return // the node is being closed; the network is not left
	}
	id := ztnode.NetworkID(nwid)
	n.mu.Lock()
	nets := maps.Clone(*n.nets.Load())
	if op == opDestroy {
		delete(nets, id)
		n.fresh[id] = false
	} else {
		nets[id] = network(nets[id], id, c)
		n.fresh[id] = n.fresh[id] || op == opUp || int(c.status) == statusOK
	}
	n.nets.Store(&nets)
	n.mu.Unlock()
	n.notify()
	n.kick()
}

// network copies what is needed of a configuration. One without status OK leaves
// the rest as it was (chapter 05 §5.4).
func network(old *ztnode.Network, id ztnode.NetworkID, c *C.core_config) *ztnode.Network {
	v := &ztnode.Network{ID: id, Type: ztnode.TypePrivate, MTU: defaultMTU}
	if old != nil {
		*v = *old
	}
	v.Status = ztnode.StatusPortError
	if statuses, s := ztnode.Statuses(), int(c.status); s >= 0 && s < len(statuses) {
		v.Status = statuses[s]
	}
	for i := range v.MAC {
		v.MAC[i] = byte(c.mac >> (40 - 8*i))
	}
	v.AuthURL = text(c.auth_url[:])
	if int(c.status) != statusOK {
		return v
	}
	v.Name, v.MTU, v.Revision = text(c.name[:]), int(c.mtu), uint64(c.revision)
	v.Bridge, v.Broadcast = c.bridge != 0, c.broadcast != 0
	v.Type = ztnode.TypePrivate
	if c._type == 1 {
		v.Type = ztnode.TypePublic
	}
	v.Addresses, v.Routes, v.DNSServers = nil, nil, nil
	for i := range min(int(c.address_count), len(c.address)) {
		if p, ok := prefix(&c.address[i]); ok {
			v.Addresses = append(v.Addresses, p)
		}
	}
	for i := range min(int(c.route_count), len(c.route)) {
		if p, ok := prefix(&c.route[i].target); ok {
			r := ztnode.Route{Target: p.Masked()}
			if via, ok := prefix(&c.route[i].via); ok {
				r.Via = via.Addr()
			}
			v.Routes = append(v.Routes, r)
		}
	}
	v.DNSDomain = text(c.dns.domain[:])
	for i := range c.dns.server {
		if p, ok := prefix(&c.dns.server[i]); ok {
			v.DNSServers = append(v.DNSServers, p.Addr())
		}
	}
	return v
}

func text(c []C.char) string {
	b := unsafe.Slice((*byte)(unsafe.Pointer(&c[0])), len(c))
	for i, x := range b {
		if x == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}

// prefix reads an address whose port is the length of its prefix. A length that
// is too large, as with a port, is the whole address.
func prefix(ss *C.core_addr) (netip.Prefix, bool) {
	var d C.shim_datagram
	C.shim_endpoint(ss, &d)
	e, ok := endpoint(&d)
	if !ok {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(e.Addr(), min(int(e.Port()), e.Addr().BitLen())), true
}

// Events (chapter 05 §5.5).
const (
	eventOffline   = 1
	eventOnline    = 2
	eventCollision = 4
)

//export goEvent
func goEvent(h C.uintptr_t, event C.int) {
	n := node(h)
	defer n.guard()
	if n == nil {
		return
	}
	switch event {
	case eventOffline:
		n.online.Store(false)
	case eventOnline:
		n.online.Store(true)
	case eventCollision:
		n.collision.Store(true)
	default:
		return
	}
	n.kick()
}

//export goPathCheck
func goPathCheck(h C.uintptr_t, d *C.shim_datagram) (ok C.int) {
	n := node(h)
	defer n.guard()
	if n == nil {
		return 0
	}
	if e, valid := endpoint(d); valid && !n.insideNetwork(e.Addr()) {
		return 1
	}
	return 0
}

//export goLate
func goLate(h C.uintptr_t, kept C.int) {
	n := node(h)
	defer n.guard()
	if n == nil {
		return
	}
	if kept == 0 {
		n.lateLost.Add(1)
		return
	}
	n.late.Store(true)
	n.kick()
}
