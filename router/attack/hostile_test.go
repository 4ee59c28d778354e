//go:build e2e

package attack

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"time"

	"ztgate/internal/testwait"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/network"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
)

// hostile is a node inside this process that says what it is told to, besides what
// keeps it connected.
type hostile struct {
	w      *world
	id     *identity.Identity
	addr   netip.Addr // in the overlay
	mac    vl2.MAC
	core   *vl1.Core
	layer  *network.Layer
	conn   *net.UDPConn
	rules  *controller // of networks of its own, nil = none
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu     sync.Mutex // guards what follows, and the use of core by the attack
	rx, tx *vl1.Worker
	frames [][]byte // that came in lately
}

// hostilePort is where the nodes of the stranger's host begin.
const hostilePort = 21000

// join starts a node that knows the network's ID. With an address in the overlay it
// is authorised there. It stays for the rest of the run.
func (w *world) join(name string, ip string) *hostile {
	w.t.Helper()
	if h := w.members[name]; h != nil {
		h.meet()
		return h
	}
	id := w.identity(len(w.members))
	h := &hostile{w: w, id: id, mac: vl2.MACOf(w.Network, id.Address())}
	if ip != "" {
		h.addr = netip.MustParseAddr(ip)
		w.authorise(id.Address(), true, ip)
	}
	local := netip.AddrPortFrom(netip.MustParseAddr(strangerWire), uint16(hostilePort+len(w.members)))
	c, err := w.stranger.ListenPacket("udp4", local.String())
	w.must(err)
	h.conn = c.(*net.UDPConn)
	h.rules = &controller{h: h}
	h.layer = network.New(network.Config{Identity: id, Deliver: h.deliver, Controller: h.rules})
	h.core, err = vl1.New(vl1.Config{Identity: id, Planet: w.planet, Upper: h.layer, Start: time.Now(), SoftwareVersion: [3]int{1, 14, 1},
		LocalEndpoints: func() []netip.AddrPort { return []netip.AddrPort{local} }, SocketOpen: func(vl1.SocketID) bool { return true }})
	w.must(err)
	h.layer.SetPeers(h.core)
	h.rx, h.tx = h.core.NewWorker(), h.core.NewWorker()
	w.must(h.layer.Join(h, time.Now(), w.Network, nil))
	ctx, cancel := context.WithCancel(context.Background())
	h.cancel = cancel
	h.done.Go(h.receive)
	h.done.Go(func() { h.tick(ctx) })
	w.members[name] = h
	w.atEnd(func() {
		cancel()
		_ = h.conn.Close()
		h.done.Wait()
	})
	if ip != "" {
		testwait.NoError(w.t, patience, func() error {
			if s, _ := h.layer.Network(w.Network); s.Status != network.StatusOK {
				return fmt.Errorf("%s is not in the network: %s", name, s.Status)
			}
			return nil
		})
	}
	h.meet()
	return h
}

// meet waits until node and gateway know each other, on a direct path.
func (h *hostile) meet() {
	h.w.t.Helper()
	to := h.w.gateway.Address()
	testwait.NoError(h.w.t, patience, func() error {
		for _, p := range h.core.Peers() {
			if p.Address == to && !p.Relayed && len(p.Paths) > 0 {
				return nil
			}
		}
		h.say(packet.VerbEcho, []byte("hello"))
		return fmt.Errorf("no direct path to the gateway")
	})
	if h.addr.IsValid() { // and until it lets our frames in
		gw := netip.MustParseAddr(gwOverlay)
		testwait.NoError(h.w.t, patience, func() error {
			if !h.asks(gw) {
				return fmt.Errorf("the gateway doesn't answer ARP")
			}
			return nil
		})
	}
}

// asks reports whether the gateway answers an ARP request for an address.
func (h *hostile) asks(a netip.Addr) bool {
	h.mu.Lock()
	h.frames = nil
	h.mu.Unlock()
	gw := vl2.MACOf(h.w.Network, h.w.gateway.Address())
	h.write(gw, 0x0806, arp(1, h.mac, h.addr, [6]byte{}, a))
	return testwait.Poll(300*time.Millisecond, func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		for _, f := range h.frames {
			if len(f) >= 42 && be.Uint16(f[12:]) == 0x0806 && be.Uint16(f[20:]) == 2 {
				return true
			}
		}
		return false
	})
}

// Send implements [vl1.Out].
func (h *hostile) Send(_ vl1.SocketID, to netip.AddrPort, head, data []byte) {
	_, _ = h.conn.WriteToUDPAddrPort(append(head[:len(head):len(head)], data...), to)
}

// SendTTL implements [vl1.Out].
func (h *hostile) SendTTL(vl1.SocketID, netip.AddrPort, []byte, int) {}

func (h *hostile) receive() {
	inbox := h.layer.NewWorker()
	h.rx.User = inbox
	b := make([]byte, 1<<16)
	for {
		k, from, err := h.conn.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		h.mu.Lock()
		h.core.Receive(h.rx.Begin(h, time.Now()), 1, netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), b[:k])
		h.layer.Flush(inbox)
		h.mu.Unlock()
	}
}

func (h *hostile) tick(ctx context.Context) {
	t := time.NewTicker(100 * time.Millisecond)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		h.mu.Lock()
		h.core.Tick(h, time.Now())
		h.layer.Tick(h, time.Now())
		h.mu.Unlock()
	}
}

// deliver is called with mu held.
func (h *hostile) deliver(_ vl2.NetworkID, frames [][]byte) {
	for _, f := range frames {
		if len(h.frames) < 64 {
			h.frames = append(h.frames, append([]byte(nil), f...))
		}
	}
}

// say sends a packet to the gateway.
func (h *hostile) say(v packet.Verb, payload []byte) { h.sayTo(h.w.gateway.Address(), v, payload) }

func (h *hostile) sayTo(to identity.Address, v packet.Verb, payload []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	w := h.tx.Begin(h, time.Now())
	if p := h.core.Peer(to); p != nil && h.core.SendData(w, p, v, append(make([]byte, packet.HeaderLen), payload...)) {
		return
	}
	h.core.Send(w, to, v, payload, vl1.SendOpts{})
}

// write sends a frame as an honest member does, with a certificate when it is due.
func (h *hostile) write(dst vl2.MAC, etherType uint16, data []byte) {
	const room = 64
	b := append(make([]byte, room), dst[:]...)
	b = be.AppendUint16(append(b, h.mac[:]...), etherType)
	b = append(b, data...)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.layer.WriteFrames(h.tx.Begin(h, time.Now()), h.w.Network, [][]byte{b}, []int{len(b) - room}, room)
}

// ext sends an Ethernet frame to the gateway.
func (h *hostile) ext(dst, src vl2.MAC, etherType uint16, data []byte) {
	h.say(packet.VerbExtFrame, vl2.AppendExtFrame(nil, h.w.Network, 0, dst, src, etherType, data))
}

// frame sends an IPv4 packet to the gateway.
func (h *hostile) frame(b []byte) {
	h.say(packet.VerbFrame, append(be.AppendUint16(h.w.Network.Append(nil), 0x0800), b...))
}

// controller answers for networks of a hostile node.
type controller struct {
	h      *hostile
	mu     sync.Mutex
	config func(nwid vl2.NetworkID, member identity.Address, n uint64) *vl2.NetworkConfig // nil = refuses
	count  uint64
}

// HandleRequest implements [network.Controller]. It is called with the node's mu held.
func (c *controller) HandleRequest(from *identity.Identity, id packet.ID, nwid vl2.NetworkID, _ []byte) {
	reply := be.AppendUint64([]byte{byte(packet.VerbNetworkConfigRequest)}, uint64(id))
	for _, chunk := range c.chunks(nwid, from) {
		c.h.core.Send(c.h.tx.Begin(c.h, time.Now()), from.Address(), packet.VerbOK, append(reply[:len(reply):len(reply)], chunk...), vl1.SendOpts{Compress: true})
	}
}

// Authorized implements [network.Controller].
func (c *controller) Authorized(vl2.NetworkID, identity.Address, time.Time) bool { return true }

// chunks are those of the next configuration.
func (c *controller) chunks(nwid vl2.NetworkID, member *identity.Identity) [][]byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.config == nil || nwid.Controller() != c.h.id.Address() {
		return nil
	}
	c.count++
	cfg := c.config(nwid, member.Address(), c.count)
	cfg.ID, cfg.Member, cfg.Revision = nwid, member.Address(), c.count
	cfg.Timestamp, cfg.TimeDelta = time.Now().UnixMilli(), 3_600_000
	cfg.COM, _ = vl2.NewCOM(c.h.id, nwid, member, cfg.Timestamp, cfg.TimeDelta)
	list, _ := vl2.AppendChunks(c.h.id, nwid, cfg.Encode(), rand.Uint64()|1, vl2.MaxChunk)
	return list
}

// push sends the gateway a configuration that it didn't ask for.
func (c *controller) push(nwid vl2.NetworkID) {
	for _, chunk := range c.chunks(nwid, c.h.w.gateway) {
		c.h.sayTo(c.h.w.gateway.Address(), packet.VerbNetworkConfig, chunk)
	}
}

// voice makes packets of a node without being it.
type voice struct {
	id   *identity.Identity
	keys *packet.Keys
	to   identity.Address
	s    packet.Scratch
}

func newVoice(from, to *identity.Identity) (*voice, error) {
	session, err := from.Agree(to)
	if err != nil {
		return nil, err
	}
	return &voice{id: from, keys: packet.NewKeys(session), to: to.Address()}, nil
}

func (v *voice) say(verb packet.Verb, payload []byte) packet.Packet {
	p := packet.Packet(append(make([]byte, packet.HeaderLen), payload...))
	packet.PutHeader(p, packet.ID(rand.Uint64()), v.to, v.id.Address(), verb)
	v.keys.Seal(p, packet.SuiteAES, &v.s)
	return p
}

// hello makes a HELLO that claims an old planet, which asks for the new one.
func (v *voice) hello(planet *vl1.World) packet.Packet {
	b := append([]byte{packet.ProtocolVersion, 1, 14, 0, 1}, be.AppendUint64(nil, uint64(time.Now().UnixMilli()))...)
	b = v.id.Public().AppendBinary(b)
	b = packet.AppendEndpoint(b, netip.MustParseAddrPort(gwWire))
	b = be.AppendUint64(be.AppendUint64(b, planet.ID), uint64(planet.Timestamp-1))
	masked := packet.HeaderLen + len(b)
	p := packet.Packet(append(append(make([]byte, packet.HeaderLen), b...), 0, 0))
	packet.PutHeader(p, packet.ID(rand.Uint64()), v.to, v.id.Address(), packet.VerbHello)
	v.keys.MaskHello(p, masked, &v.s)
	v.keys.Seal(p, packet.SuitePoly1305, &v.s)
	return p
}

// sealed puts a packet into an envelope, whatever protected it before.
func (v *voice) sealed(p packet.Packet, e *packet.Envelope) packet.Packet {
	return v.keys.SealHello(p, e, &v.s)
}

// pretend returns an identity with working keys, those of another one, and an address
// that doesn't follow from them.
func pretend(like *identity.Identity, a identity.Address) (*identity.Identity, error) {
	return identity.Parse(a.String() + like.SecretString()[2*identity.AddressLen:])
}
