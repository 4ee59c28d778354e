//go:build libzt

package bindings

// #include "shim.h"
import "C"

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
	"unsafe"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/ztnode"
)

var errCollision = errors.New("another node has our address: move identity.secret and identity.public away to get a new identity")

// control runs the core's background tasks at the times it asks for, and does
// what callbacks can't do themselves.
func (n *Node) control(ctx context.Context) error {
	c := controller{Node: n, subscribed: map[ztnode.NetworkID][]ztnode.Group{}, late: new(C.shim_late)}
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-n.wake:
		case <-t.C:
		}
		deadline, err := c.step(time.Now())
		if err != nil {
			return err
		}
		t.Reset(max(time.Duration(deadline-n.clock.now())*time.Millisecond, minTick))
	}
}

// minTick keeps a core that always wants to run now from spinning.
const minTick = 5 * time.Millisecond

// controller is what only the goroutine of control uses.
type controller struct {
	*Node
	subscribed map[ztnode.NetworkID][]ztnode.Group
	endpoints  []netip.AddrPort
	announced  time.Time
	wasOnline  bool
	since      time.Time // of being offline, or of the last move of the port
	late       *C.shim_late
}

func (c *controller) step(now time.Time) (deadline int64, err error) {
	var next C.int64_t
	err = c.call(func(w *worker) C.int { return C.shim_background(c.c, w.b, C.int64_t(c.clock.now()), &next) })
	var code errorCode
	switch {
	case errors.As(err, &code) && code >= 100 && code < 1000:
		return 0, fmt.Errorf("libzt: %w", err)
	case c.collision.Load():
		return 0, errCollision
	}
	if f := c.fault.Load(); f != nil {
		return 0, fmt.Errorf("callback of libzt: %s", *f)
	}
	if c.Node.late.Swap(false) {
		c.deliverLate(c.late)
	}
	c.subscribe()
	c.announce(now)
	c.checkOnline(now)
	return int64(next), nil
}

func (c *controller) checkOnline(now time.Time) {
	online := c.online.Load()
	if online != c.wasOnline {
		c.wasOnline, c.since = online, now
		c.log.Info("node state changed", "online", online)
		c.notify()
	}
	if c.since.IsZero() {
		c.since = now
	}
	if !online && now.Sub(c.since) > offlineLong {
		c.since = now
		if err := c.udp.RebindSecondary(); err != nil {
			c.log.Warn("move secondary port", "error", err)
		}
	}
}

// announce tells the core our endpoints, when they change and from time to time.
func (c *controller) announce(now time.Time) {
	eps := c.udp.LocalEndpoints()
	if now.Sub(c.announced) < endpointsAge && slices.Equal(eps, c.endpoints) {
		return
	}
	c.announced, c.endpoints = now, eps
	list := make([]C.shim_datagram, len(eps)+1)
	for i, e := range eps {
		putEndpoint(&list[i], e)
	}
	_ = c.call(func(*worker) C.int { C.shim_local(c.c, &list[0], C.uint32_t(len(eps))); return 0 })
}

// subscribe makes the core's subscriptions agree with the addresses and with
// what was asked for.
func (c *controller) subscribe() {
	c.mu.Lock()
	due := c.fresh
	c.fresh = map[ztnode.NetworkID]bool{}
	want := map[ztnode.NetworkID][]ztnode.Group{}
	for id := range due {
		if v := (*c.nets.Load())[id]; v != nil {
			want[id] = append(ownGroups(v), c.groups[id]...)
		}
	}
	c.mu.Unlock()
	for id, anew := range due {
		groups, joined := want[id]
		if !joined || anew {
			delete(c.subscribed, id)
		}
		if !joined {
			continue
		}
		_ = c.call(func(w *worker) C.int {
			for _, g := range c.subscribed[id] {
				if !slices.Contains(groups, g) {
					C.shim_unsubscribe(c.c, C.uint64_t(id), macNumber(g.MAC), C.uint32_t(g.ADI))
				}
			}
			for _, g := range groups {
				C.shim_subscribe(c.c, w.b, C.uint64_t(id), macNumber(g.MAC), C.uint32_t(g.ADI))
			}
			return 0
		})
		c.subscribed[id] = groups
	}
}

// ownGroups are those without which nobody can resolve our addresses (chapter 05
// §10.1).
func ownGroups(v *ztnode.Network) []ztnode.Group {
	broadcast := ztnode.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	var out []ztnode.Group
	if v.Broadcast {
		out = append(out, ztnode.Group{MAC: broadcast})
	}
	v6 := false
	for _, p := range v.Addresses {
		if a := p.Addr(); a.Is4() {
			b := a.As4()
			out = append(out, ztnode.Group{MAC: broadcast, ADI: binary.BigEndian.Uint32(b[:])})
		} else {
			b := a.As16()
			out = append(out, ztnode.Group{MAC: ztnode.MAC{0x33, 0x33, 0xff, b[13], b[14], b[15]}})
			v6 = true
		}
	}
	if v6 {
		out = append(out, ztnode.Group{MAC: ztnode.MAC{0x33, 0x33, 0, 0, 0, 1}})
	}
	return out
}

func macNumber(m ztnode.MAC) C.uint64_t {
	var v C.uint64_t
	for _, b := range m {
		v = v<<8 | C.uint64_t(b)
	}
	return v
}

// Join joins a network and remembers it in home.
func (n *Node) Join(id ztnode.NetworkID) error {
	if nets := *n.nets.Load(); nets[id] == nil && len(nets) >= ztnode.MaxNetworks {
		return ztnode.ErrTooManyNetworks
	}
	err := n.call(func(w *worker) C.int { return C.shim_join(n.c, w.b, C.uint64_t(id)) })
	if err != nil {
		return fmt.Errorf("join network %s: %w", id, err)
	}
	layout := C.int(1)
	if err := n.call(func(*worker) C.int { layout = C.shim_layout_ok(n.c, C.uint64_t(id)); return 0 }); err != nil {
		return err
	}
	if layout == 0 {
		return fmt.Errorf("%w: its network configuration is not the %d bytes this program was built for", ErrLibrary, C.sizeof_core_config)
	}
	n.kick()
	n.notify()
	return n.store.flush()
}

// Leave leaves a network and forgets it.
func (n *Node) Leave(id ztnode.NetworkID) error {
	n.certificates.forget(id)
	err := n.call(func(w *worker) C.int { return C.shim_leave(n.c, w.b, C.uint64_t(id)) })
	n.mu.Lock()
	delete(n.groups, id)
	n.mu.Unlock()
	n.kick()
	n.notify()
	if err != nil {
		return fmt.Errorf("leave network %s: %w", id, err)
	}
	return n.store.flush()
}

// Orbit begins to use a moon; seed is the address of one of its roots, 0 if the
// moon is in home.
func (n *Node) Orbit(id uint64, seed identity.Address) error {
	err := n.call(func(w *worker) C.int { return C.shim_orbit(n.c, w.b, C.uint64_t(id), C.uint64_t(seed)) })
	n.kick()
	return err
}

// Deorbit ends the use of a moon and forgets it. It reports whether it was used.
func (n *Node) Deorbit(id uint64) (bool, error) {
	used := n.store.read(objectID{objMoon, id}) != nil
	err := n.call(func(w *worker) C.int { return C.shim_deorbit(n.c, w.b, C.uint64_t(id)) })
	n.store.put(objectID{objMoon, id}, nil)
	return used, errors.Join(err, n.store.flush())
}

// Moons describes the moons in home.
func (n *Node) Moons() []ztnode.Moon {
	out := []ztnode.Moon{}
	for _, id := range n.store.ids(objMoon) {
		if w, _, err := vl1.ParseWorld(n.store.read(objectID{objMoon, id})); err == nil {
			out = append(out, vl1.MoonInfo{ID: id, World: w}.Describe())
		} else { // the core doesn't tell whom it asks
			out = append(out, ztnode.Moon{ID: ztnode.MoonID(id), Waiting: true, Roots: []ztnode.PlanetRoot{}})
		}
	}
	return out
}

// RootEndpoints returns where the planet and the moons say that their roots are.
func (n *Node) RootEndpoints() []netip.AddrPort {
	var out []netip.AddrPort
	worlds := []objectID{{objPlanet, 0}}
	for _, id := range n.store.ids(objMoon) {
		worlds = append(worlds, objectID{objMoon, id})
	}
	for _, o := range worlds {
		if w, _, err := vl1.ParseWorld(n.store.read(o)); err == nil {
			out = append(out, w.Endpoints()...)
		}
	}
	return out
}

// SetMulticastGroups replaces the port's subscriptions in a network. The groups
// for address resolution of the assigned addresses need not be listed.
func (n *Node) SetMulticastGroups(id ztnode.NetworkID, groups []ztnode.Group) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, joined := (*n.nets.Load())[id]; !joined || slices.Equal(n.groups[id], groups) {
		return
	}
	n.groups[id] = slices.Clone(groups)
	if _, due := n.fresh[id]; !due {
		n.fresh[id] = false
	}
	n.kick()
}

// kick makes the control goroutine look again.
func (n *Node) kick() {
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// Watch returns a channel that gets a value after any change of a network's
// status or configuration or of the online state, and a function that ends it.
func (n *Node) Watch() (<-chan struct{}, func()) { return n.watchers.Watch() }

func (n *Node) notify() { n.watchers.Notify() }

// SetOverlayPrefixes says which addresses lie in overlay networks, by the judgement of
// whoever sets up interfaces and routes: no path leads there.
func (n *Node) SetOverlayPrefixes(list []netip.Prefix) {
	list = slices.Clone(list)
	n.inside.Store(&list)
}

func (n *Node) insideNetwork(a netip.Addr) bool {
	for _, p := range *n.inside.Load() {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// Info describes the node. The core doesn't tell how others see its address.
func (n *Node) Info() ztnode.Info {
	i := n.info
	i.Online = n.online.Load()
	i.Surface = []netip.AddrPort{}
	if ports := n.udp.Ports(); len(ports) > 0 {
		i.PrimaryPort = ports[0]
	}
	if w, _, err := vl1.ParseWorld(n.store.read(objectID{objPlanet, 0})); err == nil {
		i.PlanetID, i.PlanetTimestamp = w.ID, w.Timestamp
		i.Root = slices.ContainsFunc(w.Roots, func(r vl1.Root) bool { return r.Identity.Address().String() == i.Address })
	}
	return i
}

// Networks describes the joined networks.
func (n *Node) Networks() []ztnode.Network {
	out := []ztnode.Network{}
	for id, v := range *n.nets.Load() {
		c := *v
		c.Certificate = n.certificates.expiry(id, n.store.read(objectID{objNetwork, uint64(id)}))
		out = append(out, c)
	}
	return out
}

// Peers describes all known peers.
func (n *Node) Peers() []ztnode.Peer {
	n.life.RLock()
	defer n.life.RUnlock()
	if n.closed {
		return nil
	}
	l := C.shim_peers(n.c)
	if l == nil {
		n.log.Error("list of libzt's peers has an unknown layout")
		return nil
	}
	defer C.shim_free(n.c, unsafe.Pointer(l))
	now := n.clock.now()
	out := make([]ztnode.Peer, 0, l.count)
	if l.count == 0 {
		return out
	}
	for i := range unsafe.Slice(l.peers, l.count) {
		out = append(out, peer(&unsafe.Slice(l.peers, l.count)[i], now))
	}
	return out
}

func peer(p *C.core_peer, now int64) ztnode.Peer {
	roles := ztnode.Roles()
	v := ztnode.Peer{Address: fmt.Sprintf("%010x", uint64(p.address)), Role: roles[min(uint(p.role), uint(len(roles)-1))], Version: "-",
		Latency: ztnode.Milliseconds(millis(float64(p.latency))), Relayed: true, Cipher: 1, Paths: []ztnode.Path{}}
	if p.major >= 0 {
		v.Version = fmt.Sprintf("%d.%d.%d", p.major, p.minor, p.revision)
		if p.major > 1 || p.minor >= 10 {
			v.Cipher = 3 // the core's choice for peers that understand it
		}
	}
	for i := range min(int(p.path_count), len(p.path)) {
		pa := &p.path[i]
		var d C.shim_datagram
		C.shim_endpoint(&pa.address, &d)
		e, ok := endpoint(&d)
		if !ok {
			continue
		}
		w := ztnode.Path{Endpoint: e, Preferred: pa.preferred != 0, Expired: pa.expired != 0, LastSend: wall(pa.last_send, now),
			LastReceive: wall(pa.last_receive, now), Latency: v.Latency}
		if d := millis(float64(pa.latency_mean)); d > 0 {
			w.Latency = ztnode.Milliseconds(d)
		}
		if w.Preferred && !w.Expired {
			v.Relayed = false
		}
		if w.LastReceive.After(v.LastReceive) {
			v.LastReceive = w.LastReceive
		}
		v.Paths = append(v.Paths, w)
	}
	return v
}

// wall turns a time of the core into one of the wall clock.
func wall(ms C.uint64_t, now int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.Now().Add(-time.Duration(now-int64(ms)) * time.Millisecond)
}

func millis(ms float64) time.Duration {
	if ms < 0 {
		return -1
	}
	return time.Duration(ms * float64(time.Millisecond))
}

// Stats returns the counters.
func (n *Node) Stats() Stats {
	s := Stats{TxFragments: n.txFragments.Load(), RxFragments: n.rxFragments.Load(), Full: n.full.Load() + n.lateLost.Load(),
		Refused: n.refused.Load(), Oversize: n.oversize.Load(), OwnMAC: n.ownMAC.Load(), NoNetwork: n.noNetwork.Load()}
	for i := range s.TxBytes {
		s.TxBytes[i], s.RxBytes[i] = n.txBytes[i].Load(), n.rxBytes[i].Load()
	}
	return s
}
