package network_test

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ed25519"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"testing"
	"time"

	"ztgate/zerotier/controller"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/budget"
	"ztgate/zerotier/network"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
)

// board connects the network layers of many nodes without a peer layer between
// them: identities that nobody would accept on the wire, and no encryption, so that
// hundreds of members with a real controller fit into one test.
type board struct {
	t     testing.TB
	now   time.Time
	nodes map[identity.Address]*seat
	order []*seat
	queue []boardPacket
	ctl   *controller.Controller
	root  *seat
	dir   string
	sent  int

	budget    *budget.Budget
	strangers bool // senders share no network with anybody
	// drop, if not nil, decides which packets are lost.
	drop func(from, to identity.Address, v packet.Verb) bool
}

type boardPacket struct {
	from, to identity.Address
	p        packet.Packet
}

// seat is a node at the board. It implements [network.Peers].
type seat struct {
	b      *board
	id     *identity.Identity
	peer   *vl1.Peer // as others see it
	layer  *network.Layer
	worker *vl1.Worker
	nw     *network.Worker
	got    map[vl2.NetworkID][][]byte
	kept   []boardPacket // to be handled again
}

func fakeIdentity(t testing.TB, r *rand.ChaCha8, a identity.Address) *identity.Identity {
	t.Helper()
	var x, e [32]byte
	_, _ = r.Read(x[:])
	_, _ = r.Read(e[:])
	key, err := ecdh.X25519().NewPrivateKey(x[:])
	if err != nil {
		t.Fatal(err)
	}
	pub := append(key.PublicKey().Bytes(), ed25519.NewKeyFromSeed(e[:]).Public().(ed25519.PublicKey)...)
	id, err := identity.Parse(fmt.Sprintf("%s:0:%x:%x", a, pub, append(x[:], e[:]...)))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// newBoard seats a root, which is also the controller, and members 1 to n.
func newBoard(t testing.TB, members int) *board {
	b := &board{t: t, now: time.Unix(1_760_000_000, 0), nodes: make(map[identity.Address]*seat), dir: t.TempDir(), budget: budget.New(nil)}
	if dir, err := os.MkdirTemp("/dev/shm", "board"); err == nil { // the controller syncs every record
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		b.dir = dir
	}
	r := rand.NewChaCha8([32]byte{1})
	for i := range members + 1 {
		b.sit(fakeIdentity(t, r, 0x0a00000000+identity.Address(i)), i == 0)
	}
	return b
}

// sit adds a node; the first one is the root.
func (b *board) sit(id *identity.Identity, control bool) *seat {
	s := &seat{b: b, id: id, peer: vl1.NewPeer(id), worker: &vl1.Worker{}, got: make(map[vl2.NetworkID][][]byte)}
	if b.root == nil {
		b.root = s
	}
	cfg := network.Config{Identity: s.id, Deliver: func(n vl2.NetworkID, frames [][]byte) {
		for _, f := range frames {
			s.got[n] = append(s.got[n], bytes.Clone(f))
		}
	}}
	if control {
		b.startController(s)
		cfg.Controller = boardController{b}
	}
	s.layer = network.New(cfg)
	s.layer.SetPeers(s)
	s.nw = s.layer.NewWorker()
	s.worker.User = s.nw
	b.nodes[s.id.Address()] = s
	b.order = append(b.order, s)
	return s
}

// boardController is the controller of the moment, which a restart replaces.
type boardController struct{ b *board }

func (c boardController) HandleRequest(from *identity.Identity, id packet.ID, n vl2.NetworkID, metadata []byte) {
	c.b.ctl.HandleRequest(from, id, n, metadata)
}

func (c boardController) Authorized(n vl2.NetworkID, a identity.Address, now time.Time) bool {
	return c.b.ctl.Authorized(n, a, now)
}

func (b *board) startController(s *seat) {
	c, err := controller.New(controller.Config{Identity: s.id, Dir: b.dir, Now: func() time.Time { return b.now },
		Send: func(dst identity.Address, v packet.Verb, payload []byte, _ bool) {
			if dst == s.id.Address() {
				s.layer.HandleSelf(nil, b.now, v, payload)
				return
			}
			s.put(dst, v, payload)
		}})
	if err != nil {
		b.t.Fatal(err)
	}
	b.ctl = c
}

func (s *seat) put(to identity.Address, v packet.Verb, payload []byte) {
	s.b.sent++
	if s.b.drop != nil && s.b.drop(s.id.Address(), to, v) {
		return
	}
	p := packet.Packet(append(make([]byte, packet.HeaderLen), payload...))
	packet.PutHeader(p, packet.ID(s.b.sent), to, s.id.Address(), v)
	s.b.queue = append(s.b.queue, boardPacket{s.id.Address(), to, p})
}

func (s *seat) Peer(a identity.Address) *vl1.Peer {
	if n := s.b.nodes[a]; n != nil {
		return n.peer
	}
	return nil
}
func (s *seat) Lookup(*vl1.Worker, identity.Address) {}
func (s *seat) Send(_ *vl1.Worker, dst identity.Address, v packet.Verb, payload []byte, _ vl1.SendOpts) {
	s.put(dst, v, payload)
}
func (s *seat) SendData(_ *vl1.Worker, p *vl1.Peer, v packet.Verb, buf []byte) bool {
	s.put(p.Address(), v, buf[packet.HeaderLen:])
	return true
}
func (s *seat) SendOK(_ *vl1.Worker, to *vl1.Peer, _ vl1.Source, inRe packet.Verb, id packet.ID, payload []byte) {
	b := binary.BigEndian.AppendUint64([]byte{byte(inRe)}, uint64(id))
	s.put(to.Address(), packet.VerbOK, append(b, payload...))
}
func (s *seat) SendError(_ *vl1.Worker, to *vl1.Peer, _ vl1.Source, inRe packet.Verb, id packet.ID, code packet.ErrorCode, payload []byte) {
	b := append(binary.BigEndian.AppendUint64([]byte{byte(inRe)}, uint64(id)), byte(code))
	s.put(to.Address(), packet.VerbError, append(b, payload...))
}
func (s *seat) Upstreams() []identity.Address      { return []identity.Address{s.b.root.id.Address()} }
func (s *seat) BestUpstream() identity.Address     { return s.b.root.id.Address() }
func (s *seat) IsUpstream(a identity.Address) bool { return a == s.b.root.id.Address() }
func (s *seat) Reachable(a identity.Address) bool  { return s.b.nodes[a] != nil }
func (s *seat) KeepContact([]identity.Address) int { return 0 }
func (s *seat) Afford(w *vl1.Worker, from *vl1.Peer, k budget.Kind, pieces int) (budget.Work, bool) {
	return s.b.budget.Take(s.b.now.UnixNano(), budget.Sender{Address: from.Address(), Member: !s.b.strangers}, k, pieces)
}
func (s *seat) IsRoot() bool                          { return s == s.b.root }
func (s *seat) NewWorker() *vl1.Worker                { return &vl1.Worker{} }
func (s *seat) mac(n vl2.NetworkID) vl2.MAC           { return vl2.MACOf(n, s.id.Address()) }
func (s *seat) address() identity.Address             { return s.id.Address() }
func (s *seat) status(n vl2.NetworkID) network.Status { x, _ := s.layer.Network(n); return x.Status }
func (s *seat) config(n vl2.NetworkID) *vl2.NetworkConfig {
	x, _ := s.layer.Network(n)
	return x.Config
}

func (s *seat) handle(q boardPacket) {
	from := s.b.nodes[q.from]
	res := s.layer.HandlePacket(s.worker.Begin(nil, s.b.now), from.peer, packet.Packet(bytes.Clone(q.p)), vl1.Source{})
	s.layer.Flush(s.nw)
	if res.Retry && len(s.kept) < 64 {
		s.kept = append(s.kept, q)
	}
}

// settle delivers everything that is under way.
func (b *board) settle() {
	for rounds := 0; len(b.queue) > 0; rounds++ {
		if rounds > 1000 {
			b.t.Fatal("packets never cease")
		}
		queue := b.queue
		b.queue = nil
		for _, q := range queue {
			if n := b.nodes[q.to]; n != nil {
				n.handle(q)
			}
		}
	}
}

// run moves the clock in steps.
func (b *board) run(d, step time.Duration) {
	for end := b.now.Add(d); b.now.Before(end); {
		b.now = b.now.Add(step)
		if b.ctl != nil {
			b.ctl.Work(b.now)
		}
		b.settle()
		for _, s := range b.order {
			s.layer.Tick(nil, b.now)
			kept := s.kept
			s.kept = nil
			for _, q := range kept {
				s.handle(q)
			}
		}
		b.settle()
	}
}

func (s *seat) write(n vl2.NetworkID, dst vl2.MAC, etherType uint16, payload []byte) bool {
	buf := make([]byte, 64, 64+14+len(payload))
	src := s.mac(n)
	buf = append(append(buf, dst[:]...), src[:]...)
	buf = append(binary.BigEndian.AppendUint16(buf, etherType), payload...)
	return s.layer.WriteFrames(s.worker.Begin(nil, s.b.now), n, [][]byte{buf}, []int{len(buf) - 64}, 64) == 1
}

// count says how many frames with a payload came.
func (s *seat) count(n vl2.NetworkID, payload []byte) (c int) {
	for _, f := range s.got[n] {
		if bytes.Equal(f[14:], payload) {
			c++
		}
	}
	return c
}

// create makes a network; change may be nil.
func (b *board) create(change func(*controller.Network)) vl2.NetworkID {
	b.t.Helper()
	rec := controller.DefaultNetwork()
	rec.V4AssignMode.ZT = true
	rec.Routes = []controller.Route{{Target: netip.MustParsePrefix("10.9.0.0/16")}}
	rec.IPAssignmentPools = []controller.Pool{{Start: netip.MustParseAddr("10.9.0.1"), End: netip.MustParseAddr("10.9.255.250")}}
	if change != nil {
		change(&rec)
	}
	n, err := b.ctl.CreateNetwork(rec)
	if err != nil {
		b.t.Fatal(err)
	}
	return n.ID
}

func (b *board) member(n vl2.NetworkID, s *seat, change func(*controller.Member)) {
	b.t.Helper()
	if _, err := b.ctl.UpdateMember(n, s.address(), func(m *controller.Member) error { change(m); return nil }); err != nil {
		b.t.Fatal(err)
	}
}

// join authorises nodes and lets them join.
func (b *board) join(n vl2.NetworkID, seats ...*seat) {
	b.t.Helper()
	for _, s := range seats {
		b.member(n, s, func(m *controller.Member) { m.Authorized = true })
		if err := s.layer.Join(nil, b.now, n, nil); err != nil {
			b.t.Fatal(err)
		}
	}
	b.run(3*time.Second, 500*time.Millisecond)
	for _, s := range seats {
		if s.status(n) != network.StatusOK {
			b.t.Fatalf("%s: %v", s.address(), s.status(n))
		}
	}
}

// talk sends a frame each way and reports which arrived.
func (b *board) talk(n vl2.NetworkID, x, y *seat) (atY, atX bool) {
	x.got, y.got = map[vl2.NetworkID][][]byte{}, map[vl2.NetworkID][][]byte{}
	x.write(n, y.mac(n), vl2.EtherTypeIPv4, frame)
	y.write(n, x.mac(n), vl2.EtherTypeIPv4, frame)
	b.run(2*time.Second, 250*time.Millisecond)
	return y.count(n, frame) > 0, x.count(n, frame) > 0
}

func (s *seat) ip4(t testing.TB, n vl2.NetworkID) netip.Addr {
	t.Helper()
	for _, p := range s.config(n).Addresses {
		if p.Addr().Is4() {
			return p.Addr()
		}
	}
	t.Fatalf("%s has no IPv4 address", s.address())
	return netip.Addr{}
}

func (s *seat) arp(t testing.TB, n vl2.NetworkID, target netip.Addr) []byte {
	b := []byte{0, 1, 8, 0, 6, 4, 0, 1}
	mac, ip, to := s.mac(n), s.ip4(t, n).As4(), target.As4()
	b = append(append(b, mac[:]...), ip[:]...)
	return append(append(b, 0, 0, 0, 0, 0, 0), to[:]...)
}
