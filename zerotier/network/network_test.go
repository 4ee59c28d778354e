package network_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/testvec"
	"ztgate/zerotier/network"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/simnet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
)

// host is a node with its networks.
type host struct {
	id    *identity.Identity
	core  *vl1.Core
	layer *network.Layer
	w, tx *vl1.Worker
	nw    *network.Worker
	port  *simnet.Port
	ctl   *authority
	got   [][]byte
	peers *recorder

	discard bool // don't keep frames in got
	simple  bool // as the reference: ignores groups that come before the certificate
}

// HandlePacket implements [vl1.Upper].
func (h *host) HandlePacket(w *vl1.Worker, from *vl1.Peer, p packet.Packet, src vl1.Source) vl1.Result {
	if h.simple && p.Verb() == packet.VerbMulticastLike {
		replies := h.peers.Core
		h.layer.SetPeers(silent{replies})
		defer h.layer.SetPeers(h.peers)
	}
	res := h.layer.HandlePacket(w, from, p, src)
	if h.simple && p.Verb() == packet.VerbMulticastLike {
		res.Retry = false
	}
	return res
}

// PeerLearned implements [vl1.Upper].
func (h *host) PeerLearned(w *vl1.Worker, p *vl1.Peer) { h.layer.PeerLearned(w, p) }

// silent refuses nothing aloud.
type silent struct{ *vl1.Core }

func (silent) SendError(*vl1.Worker, *vl1.Peer, vl1.Source, packet.Verb, packet.ID, packet.ErrorCode, []byte) {
}

// recorder keeps what a node replies to others.
type recorder struct {
	*vl1.Core
	replies []string // verb and payload without the packet ID
	checked int      // signatures
}

func (r *recorder) SendOK(w *vl1.Worker, to *vl1.Peer, src vl1.Source, inRe packet.Verb, id packet.ID, payload []byte) {
	r.replies = append(r.replies, fmt.Sprintf("OK %02x %x", uint8(inRe), payload))
	r.Core.SendOK(w, to, src, inRe, id, payload)
}

func (r *recorder) SendError(w *vl1.Worker, to *vl1.Peer, src vl1.Source, inRe packet.Verb, id packet.ID, code packet.ErrorCode, payload []byte) {
	r.replies = append(r.replies, fmt.Sprintf("ERROR %02x %02x %x", uint8(inRe), uint8(code), payload))
	r.Core.SendError(w, to, src, inRe, id, code, payload)
}

func (h *host) Receive(out vl1.Out, now time.Time, sock vl1.SocketID, from netip.AddrPort, d []byte) {
	h.core.Receive(h.w.Begin(out, now), sock, from, d)
	h.layer.Flush(h.nw)
}

func (h *host) Tick(out vl1.Out, now time.Time) time.Time {
	next := h.core.Tick(out, now)
	if t := h.layer.Tick(out, now); t.Before(next) {
		next = t
	}
	if h.ctl != nil {
		h.ctl.run(h, out, now)
	}
	return next
}

// authority is a minimal controller: it signs what it is asked for.
type authority struct {
	n          vl2.NetworkID
	authorized map[identity.Address]bool
	config     func(*vl2.NetworkConfig)
	requests   []request
	asked      map[identity.Address]int // all requests there were
	revoke     []identity.Address
	members    map[identity.Address]bool
}

type request struct {
	from *identity.Identity
	id   packet.ID
	n    vl2.NetworkID
}

func (c *authority) HandleRequest(from *identity.Identity, id packet.ID, n vl2.NetworkID, _ []byte) {
	if n.Controller() == c.n.Controller() {
		c.requests = append(c.requests, request{from, id, n})
		if c.asked != nil {
			c.asked[from.Address()]++
		}
	}
}
func (c *authority) Authorized(vl2.NetworkID, identity.Address, time.Time) bool { return true }

func (c *authority) run(h *host, out vl1.Out, now time.Time) {
	for _, q := range c.requests {
		reply := binary.BigEndian.AppendUint64([]byte{byte(packet.VerbNetworkConfigRequest)}, uint64(q.id))
		a := q.from.Address()
		if !c.authorized[a] {
			h.core.Send(h.tx.Begin(out, now), a, packet.VerbError, q.n.Append(append(reply, byte(packet.ErrorNetworkAccessDenied))), vl1.SendOpts{})
			continue
		}
		c.members[a] = true
		cfg := &vl2.NetworkConfig{
			ID: q.n, Member: a, Timestamp: now.UnixMilli(), TimeDelta: 1800000, Revision: 1, MTU: 2800, MulticastLimit: 32, Name: "test",
			Rules: []vl2.Rule{{Type: vl2.ActionAccept}}, Addresses: []netip.Prefix{netip.PrefixFrom(ipOf(a), 24)},
			Flags: vl2.FlagBroadcast,
		}
		com, err := vl2.NewCOM(h.id, q.n, q.from, cfg.Timestamp, cfg.TimeDelta)
		if err != nil {
			panic(err)
		}
		cfg.COM = com
		if c.config != nil {
			c.config(cfg)
		}
		chunks, err := vl2.AppendChunks(h.id, q.n, cfg.Encode(), uint64(now.UnixNano()), 0)
		if err != nil {
			panic(err)
		}
		for _, b := range chunks {
			h.core.Send(h.tx.Begin(out, now), a, packet.VerbOK, append(bytes.Clone(reply), b...), vl1.SendOpts{Compress: true})
		}
	}
	c.requests = nil
	for _, a := range c.revoke {
		delete(c.authorized, a)
		r := &vl2.Revocation{ID: 1, NetworkID: c.n, Threshold: now.UnixMilli(), Flags: vl2.FlagPropagate, Target: a, Type: vl2.TypeCOM}
		if err := r.Sign(h.id); err != nil {
			panic(err)
		}
		for m := range c.members {
			h.core.Send(h.tx.Begin(out, now), m, packet.VerbNetworkCredentials, vl2.AppendCredentials(nil, r), vl1.SendOpts{})
		}
	}
	c.revoke = nil
}

func ipOf(a identity.Address) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, byte(a)}) }

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func testIDs(t testing.TB) (ids []*identity.Identity) {
	var v struct {
		Valid []struct {
			Secret string `json:"text_secret"`
		}
	}
	testvec.Load(t, "identity.json", &v)
	for _, x := range v.Valid {
		id, err := identity.Parse(x.Secret)
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	return ids
}

func newHost(t testing.TB, n *simnet.Net, id *identity.Identity, planet *vl1.World, ctl *authority, sock netip.AddrPort, set ...func(*network.Config)) *host {
	return newHostFromCache(t, n, id, planet, ctl, sock, nil, set...)
}

// newHostFromCache starts a host that has kept records of peers.
func newHostFromCache(t testing.TB, n *simnet.Net, id *identity.Identity, planet *vl1.World, ctl *authority, sock netip.AddrPort, kept []vl1.PeerRecord, set ...func(*network.Config)) *host {
	h := &host{id: id, ctl: ctl}
	stored := func(a identity.Address) *vl1.PeerRecord {
		for i := range kept {
			if kept[i].Identity.Address() == a {
				return &kept[i]
			}
		}
		return nil
	}
	h.port = n.Attach(h, sock)
	cfg := network.Config{Identity: id, Deliver: func(_ vl2.NetworkID, frames [][]byte) {
		if h.discard {
			return
		}
		for _, f := range frames {
			h.got = append(h.got, bytes.Clone(f))
		}
	}}
	if ctl != nil {
		cfg.Controller = ctl
	}
	for _, f := range set {
		f(&cfg)
	}
	h.layer = network.New(cfg)
	core, err := vl1.New(vl1.Config{Identity: id, Planet: planet, Upper: h, Start: n.Now, SoftwareVersion: [3]int{1, 14, 1}, LocalEndpoints: h.port.Endpoints, StoredPeer: stored, StoredPeers: func(int) (all []identity.Address) {
		for _, r := range kept {
			all = append(all, r.Identity.Address())
		}
		return all
	}})
	if err != nil {
		t.Fatal(err)
	}
	h.core = core
	h.peers = &recorder{Core: core}
	h.layer.SetPeers(h.peers)
	h.w, h.tx, h.nw = core.NewWorker(), core.NewWorker(), h.layer.NewWorker()
	h.w.User = h.nw
	return h
}

// lab is a root with the controller and two members to be.
func lab(t testing.TB) (n *simnet.Net, r, a, b *host, id vl2.NetworkID) {
	ids := testIDs(t)
	n = simnet.New()
	planet := &vl1.World{ID: 1, Timestamp: 1, Roots: []vl1.Root{{Identity: ids[0].Public(), Endpoints: []netip.AddrPort{ap("203.0.113.1:9993")}}}}
	id = vl2.NetworkID(ids[0].Address())<<24 | 0x1
	ctl := &authority{n: id, authorized: make(map[identity.Address]bool), members: make(map[identity.Address]bool)}
	r = newHost(t, n, ids[0], planet, ctl, ap("203.0.113.1:9993"))
	a = newHost(t, n, ids[1], planet, nil, ap("203.0.113.2:9993"))
	b = newHost(t, n, ids[2], planet, nil, ap("203.0.113.3:9993"))
	return n, r, a, b, id
}

func (h *host) join(t testing.TB, n *simnet.Net, id vl2.NetworkID) {
	if err := h.layer.Join(h.port, n.Now, id, nil); err != nil {
		t.Fatal(err)
	}
}

func (h *host) status(id vl2.NetworkID) network.Status {
	s, _ := h.layer.Network(id)
	return s.Status
}

// write sends an Ethernet frame of the host.
func (h *host) write(n *simnet.Net, id vl2.NetworkID, dst vl2.MAC, etherType uint16, payload []byte) int {
	return h.writeFrom(n, id, vl2.MACOf(id, h.id.Address()), dst, etherType, payload)
}

// writeFrom sends a frame of a host bridged behind this one.
func (h *host) writeFrom(n *simnet.Net, id vl2.NetworkID, src, dst vl2.MAC, etherType uint16, payload []byte) int {
	buf := make([]byte, 64, 64+14+len(payload))
	buf = append(append(buf, dst[:]...), src[:]...)
	buf = append(binary.BigEndian.AppendUint16(buf, etherType), payload...)
	return h.layer.WriteFrames(h.tx.Begin(h.port, h.port.Clock()), id, [][]byte{buf}, []int{len(buf) - 64}, 64)
}

func (h *host) count(payload []byte) (n int) {
	for _, f := range h.got {
		if bytes.Equal(f[14:], payload) {
			n++
		}
	}
	return n
}

func arp(from *host, id vl2.NetworkID, target netip.Addr) []byte {
	b := []byte{0, 1, 8, 0, 6, 4, 0, 1}
	mac, ip := vl2.MACOf(id, from.id.Address()), ipOf(from.id.Address()).As4()
	b = append(append(b, mac[:]...), ip[:]...)
	t := target.As4()
	return append(append(b, 0, 0, 0, 0, 0, 0), t[:]...)
}

func up(t testing.TB) (n *simnet.Net, r, a, b *host, id vl2.NetworkID) {
	n, r, a, b, id = lab(t)
	r.ctl.authorized[a.id.Address()], r.ctl.authorized[b.id.Address()] = true, true
	a.join(t, n, id)
	b.join(t, n, id)
	if !n.RunUntil(3*time.Second, func() bool { return a.status(id) == network.StatusOK && b.status(id) == network.StatusOK }) {
		t.Fatalf("not up after 3 s: %v %v", a.status(id), b.status(id))
	}
	return n, r, a, b, id
}

func TestJoinDeniedThenAuthorized(t *testing.T) {
	n, r, a, _, id := lab(t)
	a.join(t, n, id)
	n.Run(3 * time.Second)
	if got := a.status(id); got != network.StatusAccessDenied {
		t.Fatalf("status %v, want denied", got)
	}
	r.ctl.authorized[a.id.Address()] = true
	if !n.RunUntil(8*time.Second, func() bool { return a.status(id) == network.StatusOK }) {
		t.Fatalf("status %v 8 s after authorisation", a.status(id))
	}
	s, _ := a.layer.Network(id)
	if s.Config == nil || len(s.Config.Addresses) != 1 {
		t.Errorf("configuration %+v", s.Config)
	}
}

func TestResolveAndTalk(t *testing.T) {
	n, _, a, b, id := up(t)
	n.Run(time.Second)
	request := arp(a, id, ipOf(b.id.Address()))
	a.write(n, id, vl2.BroadcastMAC, vl2.EtherTypeARP, request)
	n.Run(2 * time.Second)
	if got := b.count(request); got != 1 {
		t.Fatalf("B got the ARP request %d times, want once", got)
	}
	macA, macB := vl2.MACOf(id, a.id.Address()), vl2.MACOf(id, b.id.Address())
	for i, size := range []int{46, 1400, 2800} {
		payload := bytes.Repeat([]byte{byte(i + 1)}, size)
		if a.write(n, id, macB, vl2.EtherTypeIPv4, payload) != 1 || b.write(n, id, macA, vl2.EtherTypeIPv4, payload) != 1 {
			t.Fatal("frame not accepted")
		}
		n.Run(time.Second)
		if a.count(payload) != 1 || b.count(payload) != 1 {
			t.Errorf("%d bytes: A got %d, B got %d, want 1 each", size, a.count(payload), b.count(payload))
		}
	}
	for _, p := range a.core.Peers() {
		if p.Address == b.id.Address() && (p.Relayed || p.Suite != packet.SuiteAES) {
			t.Errorf("A to B: relayed %v, suite %d", p.Relayed, p.Suite)
		}
	}
}

func TestDeauthorize(t *testing.T) {
	n, r, a, b, id := up(t)
	macA, macB := vl2.MACOf(id, a.id.Address()), vl2.MACOf(id, b.id.Address())
	hello := []byte("an ordinary frame, long enough to be one........")
	a.write(n, id, macB, vl2.EtherTypeIPv4, hello)
	n.Run(2 * time.Second)
	if b.count(hello) != 1 {
		t.Fatal("no traffic before")
	}
	r.ctl.revoke = []identity.Address{a.id.Address()}
	n.Run(2 * time.Second)
	a.got, b.got = nil, nil
	a.write(n, id, macB, vl2.EtherTypeIPv4, hello)
	b.write(n, id, macA, vl2.EtherTypeIPv4, hello)
	n.Run(6 * time.Second)
	if b.count(hello) != 0 || a.count(hello) != 0 {
		t.Errorf("traffic after de-authorisation: B got %d, A got %d", b.count(hello), a.count(hello))
	}
	if a.status(id) != network.StatusAccessDenied { // it asks as soon as it is told
		t.Errorf("A's status is %v", a.status(id))
	}
	r.ctl.authorized[a.id.Address()] = true
	if !n.RunUntil(2*time.Minute, func() bool { return a.status(id) == network.StatusOK }) {
		t.Fatal("not up again")
	}
	a.write(n, id, macB, vl2.EtherTypeIPv4, hello)
	n.Run(3 * time.Second)
	if b.count(hello) != 1 {
		t.Errorf("B got %d frames after re-authorisation", b.count(hello))
	}
}

func TestStaysUpForHours(t *testing.T) {
	n, _, a, b, id := up(t)
	macB := vl2.MACOf(id, b.id.Address())
	for i := range 24 {
		n.Run(5 * time.Minute)
		payload := bytes.Repeat([]byte{byte(i)}, 100)
		a.write(n, id, macB, vl2.EtherTypeIPv4, payload)
		n.Run(5 * time.Second)
		if b.count(payload) != 1 {
			t.Fatalf("frame %d lost", i)
		}
	}
}

func TestAdHoc(t *testing.T) {
	n, _, a, b, _ := lab(t)
	id := vl2.NetworkID(0xff0a000000000001)
	a.join(t, n, id)
	b.join(t, n, id)
	n.Run(time.Second)
	if a.status(id) != network.StatusOK {
		t.Fatalf("status %v", a.status(id))
	}
	payload := bytes.Repeat([]byte{7}, 200)
	a.write(n, id, vl2.MACOf(id, b.id.Address()), vl2.EtherTypeIPv4, payload)
	n.Run(2 * time.Second)
	if b.count(payload) != 1 {
		t.Errorf("B got %d frames", b.count(payload))
	}
}

func TestRulesAreEnforced(t *testing.T) {
	n, r, a, b, id := lab(t)
	r.ctl.authorized[a.id.Address()], r.ctl.authorized[b.id.Address()] = true, true
	r.ctl.config = func(c *vl2.NetworkConfig) {
		c.Rules = []vl2.Rule{{Type: vl2.MatchEtherType, Field: []byte{0x08, 0x00}}, {Type: vl2.ActionAccept}, {Type: vl2.ActionDrop}}
	}
	a.join(t, n, id)
	b.join(t, n, id)
	n.Run(3 * time.Second)
	good, bad := bytes.Repeat([]byte{1}, 60), bytes.Repeat([]byte{2}, 60)
	a.write(n, id, vl2.MACOf(id, b.id.Address()), vl2.EtherTypeIPv4, good)
	a.write(n, id, vl2.MACOf(id, b.id.Address()), 0x1234, bad)
	n.Run(2 * time.Second)
	if b.count(good) != 1 || b.count(bad) != 0 {
		t.Errorf("good %d, bad %d", b.count(good), b.count(bad))
	}
}

func TestNoAllocs(t *testing.T) {
	n, _, a, b, id := up(t)
	macB, macA := vl2.MACOf(id, b.id.Address()), vl2.MACOf(id, a.id.Address())
	a.write(n, id, macB, vl2.EtherTypeIPv4, make([]byte, 100))
	n.Run(3 * time.Second)
	buf := make([]byte, 64+14+1380)
	copy(buf[64:], macB[:])
	copy(buf[70:], macA[:])
	bufs, sizes := [][]byte{buf}, []int{len(buf) - 64}
	sink := &sink{}
	delivered := 0
	if got := testing.AllocsPerRun(200, func() {
		copy(buf[64:], macB[:])
		copy(buf[70:], macA[:])
		buf[76], buf[77] = 8, 0
		if a.layer.WriteFrames(a.tx.Begin(sink, n.Now), id, bufs, sizes, 64) != 1 {
			t.Fatal("not accepted")
		}
	}); got != 0 {
		t.Errorf("WriteFrames: %v allocations", got)
	}
	b.got = nil
	_ = delivered
}

type sink struct{ last []byte }

func (s *sink) Send(_ vl1.SocketID, _ netip.AddrPort, head, data []byte) {
	s.last = append(append(s.last[:0], head...), data...)
}
func (s *sink) SendTTL(vl1.SocketID, netip.AddrPort, []byte, int) {}

// Authentic but hostile packets of a member change nothing for others.
func FuzzHandlePacket(f *testing.F) {
	f.Add([]byte{1, 2, 3}, byte(packet.VerbFrame))
	f.Add(make([]byte, 80), byte(packet.VerbMulticastFrame))
	n, _, a, b, id := up(f)
	n.Run(2 * time.Second)
	f.Fuzz(func(t *testing.T, payload []byte, verb byte) {
		if len(payload) > 2000 {
			return
		}
		for _, p := range [][]byte{payload, append(id.Append(nil), payload...)} {
			a.core.Send(a.tx.Begin(a.port, n.Now), b.id.Address(), packet.Verb(verb&0x1f), p, vl1.SendOpts{})
		}
		n.Run(200 * time.Millisecond)
		b.got = nil
	})
}
