package sim

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/internal/atomicfile"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/gateway"
	"ztgate/zerotier"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/simnet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/ztnode"
)

const home = "/home/ztgate"

// machine runs a node.
type machine struct {
	w     *world
	name  string
	id    *identity.Identity
	clock clock
	disk  *memDisk
	at    netip.AddrPort
	port  *simnet.Port      // nil = it is down
	node  *zerotier.Stepped // nil until it has started
	life  int               // how often it has started

	controller bool
	begin      func() error           // starts what runs there; nil = the node alone
	frames     func(uint64, [][]byte) // takes frames of networks
	stepped    func()                 // after the node did something
	ended      func(power bool)       // after it has ended
	busy       bool                   // something runs
	networks   []ztnode.NetworkID     // to join
}

func (w *world) newMachine(name string, id *identity.Identity, at string) *machine {
	m := &machine{w: w, name: name, id: id, clock: clock{net: w.net}, at: netip.MustParseAddrPort(at)}
	m.disk = newDisk(m.clock.now)
	must(m.disk.MkdirAll(home, 0o700))
	must(atomicfile.WriteOn(m.disk, home+"/identity.secret", []byte(id.SecretString()), 0o600))
	w.machines = append(w.machines, m)
	return m
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// do runs something on the machine. A crash of the machine ends it, and any other panic
// is a finding.
func (m *machine) do(f func()) {
	if m.busy {
		f()
		return
	}
	defer func() {
		m.busy = false
		switch r := recover(); r.(type) {
		case nil:
		case crash:
			m.crashed()
		default:
			m.w.found("panic", "%s: %v\n%s", m.name, r, debug.Stack())
		}
	}()
	m.busy = true
	f()
}

// every calls f again and again for as long as the machine runs; f returns when.
func (m *machine) every(f func() time.Duration) {
	life := m.life
	var step func()
	step = func() {
		if m.life != life || m.port == nil {
			return
		}
		m.do(func() { m.w.net.After(max(f(), 5*m.w.grain, time.Millisecond), step) })
	}
	m.w.net.After(0, step)
}

// start starts the machine.
func (m *machine) start() {
	if m.port != nil {
		return
	}
	m.life++
	m.port = m.w.net.Attach(m, m.at)
	m.w.event("start %s", m.name)
	m.do(func() {
		begin := m.begin
		if begin == nil {
			begin = func() error { _, err := m.newNode(m.frames); return err }
		}
		if err := begin(); err != nil {
			m.w.event("%s doesn't start: %v", m.name, err)
			if !m.disk.full {
				m.w.found("start", "%s doesn't start: %v", m.name, err)
			}
			m.down(false)
			return
		}
		if m == m.w.ctl && len(m.w.changes) == 0 {
			m.w.checkRecords()
		}
		for _, n := range m.networks {
			if err := m.node.Join(n); err != nil {
				m.w.event("%s can't join: %v", m.name, err)
			}
		}
		m.every(func() time.Duration { m.node.KeepPeers(); return 30 * time.Second })
	})
}

// newNode opens the machine's node.
func (m *machine) newNode(frames func(uint64, [][]byte)) (*zerotier.Stepped, error) {
	n, err := zerotier.NewStepped(zerotier.Config{Home: home, Disk: m.disk, Now: m.clock.now, Planet: m.w.planet, Controller: m.controller,
		Logger: slog.New(logHandler{m, ""}), OnFrames: frames}, m.port)
	if err != nil {
		return nil, err
	}
	m.node = n
	return n, nil
}

// crashed ends the machine: its process is killed, or its power goes.
func (m *machine) crashed() {
	if m.port == nil {
		return
	}
	power := m.w.rand.IntN(2) == 0
	m.w.event("%s crashes (power %v)", m.name, power)
	m.down(power)
	if m == m.w.gate.machine { // whose ports were whose is saved every few seconds
		m.w.losePorts()
	}
	m.disk.locked, m.disk.crashAt = false, 0
	if !power {
		return
	}
	for _, bad := range m.disk.lose(m.w.rand) {
		m.w.found("disk", "%s: %s", m.name, bad)
	}
}

// underWay is more than the longest time that a packet takes to an office: by a root, over
// two links at their slowest.
const underWay = (2*slowestLink + 1) * time.Second

// losePorts is told that ports may go to others: the gateway can't know any more which was
// whose, or their flows made room. What is under way may still be heard.
func (w *world) losePorts() {
	for _, o := range w.offices {
		o.svc.since = w.net.Now.Add(underWay)
	}
}

// down ends what runs on the machine.
func (m *machine) down(power bool) {
	m.w.net.Detach(m.port)
	m.port, m.node = nil, nil
	m.disk.locked = false
	if m.ended != nil {
		m.ended(power)
	}
}

// Receive implements [simnet.Node].
func (m *machine) Receive(_ vl1.Out, _ time.Time, sock vl1.SocketID, from netip.AddrPort, datagram []byte) {
	if m.node == nil {
		return
	}
	m.do(func() {
		m.node.Receive(sock, from, datagram)
		if m.controller {
			m.port.Wake()
		}
		m.after()
	})
}

// Tick implements [simnet.Node].
func (m *machine) Tick(vl1.Out, time.Time) time.Time {
	if m.node == nil {
		return m.w.net.Now.Add(time.Hour)
	}
	wait := time.Hour
	m.do(func() {
		next := m.node.Tick()
		wait = next.Sub(m.clock.now())
		m.after()
	})
	return m.w.net.Now.Add(max(wait, m.w.grain, 5*time.Millisecond))
}

func (m *machine) after() {
	if m.node != nil && m.node.Woken() {
		m.port.Wake()
	}
	if m.stepped != nil {
		m.stepped()
	}
}

// send sends a frame with its headroom into a network.
func (m *machine) send(nwid ztnode.NetworkID, f []byte) {
	if m.node == nil {
		return
	}
	m.do(func() {
		_, err := m.node.WriteFrames(uint64(nwid), [][]byte{f}, []int{len(f) - headroom}, headroom)
		must(err)
		m.after()
	})
}

// logHandler turns what is logged into events.
type logHandler struct {
	m     *machine
	attrs string
}

func (h logHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelInfo }
func (h logHandler) WithGroup(string) slog.Handler                { return h }
func (h logHandler) WithAttrs(list []slog.Attr) slog.Handler {
	for _, a := range list {
		h.attrs += " " + a.String()
	}
	return h
}

func (h logHandler) Handle(_ context.Context, r slog.Record) error {
	var b strings.Builder
	r.Attrs(func(a slog.Attr) bool { fmt.Fprintf(&b, " %s", a); return true })
	h.m.w.logged(h.m, r.Level, r.Message, h.attrs+b.String())
	return nil
}

// host is an IP stack that answers by the payload of requests, and keeps what is known
// of those who speak to it.
type service struct {
	w     *world
	name  string
	heard map[served]claim
	since time.Time // claims before say nothing of who has a port
}

// served is an endpoint as a server sees it, and claim who it was.
type served struct {
	proto    byte
	from, at netip.AddrPort
}

type claim struct {
	client string
	at     time.Time
}

// gate is the machine with the gateway.
type gate struct {
	*machine
	kernel     *kernel
	st         *gateway.Stepped // nil = it doesn't run
	cfg        *config.Config
	ready      bool
	readySince time.Time
	served     bool   // clients were served once: guards keep the way since
	torn       []byte // what was left of the file of mappings when it was cut
	syncs      bool   // a sync is on its way
}

func (w *world) newGate(id *identity.Identity, at string) *gate {
	g := &gate{machine: w.newMachine("gateway", id, at), kernel: hostKernel()}
	g.machine.begin, g.machine.stepped, g.machine.ended = g.begin, g.step, g.end
	return g
}

// hostKernel is the kernel of the gateway's machine as it is after a boot.
func hostKernel() *kernel {
	k := newKernel()
	k.attach(ethIndex, netip.MustParsePrefix("172.31.16.9/20"))
	k.attach(ethIndex2, netip.MustParsePrefix("192.168.5.1/24"))
	router := netip.MustParseAddr("172.31.16.1")
	k.via(netip.MustParsePrefix("0.0.0.0/0"), router)
	k.via(netip.MustParsePrefix("172.31.0.0/16"), router)
	k.via(netip.MustParsePrefix("10.50.0.0/16"), router)
	return k
}

func (g *gate) begin() (err error) {
	g.kernel.addLink(tunIndex, tunName, false)
	g.w.pings = nil
	g.st, err = gateway.NewStepped(g.cfg, slog.New(logHandler{g.machine, ""}),
		gateway.Machine{Device: tun{g}, Netlink: g.kernel, Disk: g.disk, Sysctl: sysctl, Now: g.clock.now},
		func(nc gateway.NodeConfig) (gateway.Node, error) {
			n, err := g.newNode(func(nwid uint64, frames [][]byte) {
				g.w.toGateway(nwid, frames)
				nc.OnFrames(nwid, frames)
			})
			return overlay{n, g}, err
		})
	if err != nil {
		return err
	}
	g.every(func() time.Duration { g.st.Tick(); return 500 * time.Millisecond })
	g.every(func() time.Duration { g.looked(g.st.Look()); return time.Second })
	g.every(func() time.Duration { g.sync(); return 15 * time.Second })
	g.every(g.st.Keep)
	g.every(func() time.Duration { return g.st.Probe().Sub(g.clock.now()) })
	return nil
}

// sysctl are the settings of a kernel that is set up well.
func sysctl(key string) string {
	if strings.HasSuffix(key, "/rp_filter") {
		return "2"
	}
	return "1"
}

// hostChanged is what follows when somebody changes the kernel's tables.
func (g *gate) hostChanged() {
	life := g.life
	g.w.net.After(100*time.Millisecond, func() {
		if g.life == life && g.st != nil {
			g.do(g.sync)
		}
	})
}

func (g *gate) sync() {
	g.st.Sync()
	g.w.checkKernel()
	g.step()
}

// step follows what the node did.
func (g *gate) step() {
	if g.st == nil {
		return
	}
	g.st.Flush()
	if g.st.Probing() {
		g.st.Probe()
	}
	if !g.syncs && g.st.Changed() {
		g.syncs = true
		life := g.life
		g.w.net.After(0, func() {
			g.syncs = false
			if g.life == life && g.st != nil {
				g.do(g.sync)
			}
		})
	}
}

func (g *gate) looked(h control.Health) {
	if h.Ready != g.ready {
		g.ready, g.readySince = h.Ready, g.w.net.Now
		g.w.event("ready %v: %s", h.Ready, strings.Join(h.Reasons, "; "))
	}
	g.step()
}

// stop ends the gateway in good order.
func (g *gate) stop() {
	if g.st == nil {
		return
	}
	g.do(func() {
		g.w.event("gateway stops")
		if err := g.st.Stop(); err != nil { // a full disk costs the mappings
			g.w.losePorts()
		}
		g.served = false
		g.down(false)
	})
}

func (g *gate) end(power bool) {
	if g.st != nil {
		g.st.Abandon()
	}
	g.st, g.ready, g.syncs = nil, false, false
	g.kernel.removeLink(tunIndex)
	if power {
		g.kernel, g.served = hostKernel(), false
	}
}

// fromEth takes a packet that comes to the machine from the VPC.
func (g *gate) fromEth(b []byte) {
	p, ok := parse(b)
	if !ok {
		return
	}
	switch way := g.kernel.way(p.dst.Addr()); {
	case way == tunIndex && g.st != nil:
		g.do(func() { g.st.FromVPC(b); g.after() })
	case way == ethIndex && g.served && overlayPrefix.Contains(p.dst.Addr()):
		g.w.found("kernel", "%s of %s follows the default route", p.dst, p.src)
	}
}

// tun is the interface to the VPC.
type tun struct{ g *gate }

func (tun) Read([][]byte, []int, int) (int, error) { return 0, os.ErrClosed }
func (tun) BatchSize() int                         { return 128 }
func (t tun) MTU() (int, error)                    { return 2800, nil }
func (tun) Close() error                           { return nil }

func (t tun) Write(bufs [][]byte, offset int) (int, error) {
	for _, b := range bufs {
		t.g.w.fromTUN(slices.Clone(b[offset:]))
	}
	return len(bufs), nil
}

// overlay is the gateway's node, whose frames are looked at.
type overlay struct {
	*zerotier.Stepped
	g *gate
}

func (o overlay) Controller() gateway.Controller { return nil }

func (o overlay) WriteFrames(nwid uint64, bufs [][]byte, sizes []int, offset int) (int, error) {
	for i, b := range bufs {
		o.g.w.toOverlay(ztnode.NetworkID(nwid), b[offset:offset+sizes[i]])
	}
	return o.Stepped.WriteFrames(nwid, bufs, sizes, offset)
}

// office is a member with hosts of its own and behind it.
type office struct {
	*machine
	network ztnode.NetworkID
	addrs   []netip.Addr
	svc     *service
}

func (w *world) newOffice(name string, id *identity.Identity, at string, network ztnode.NetworkID, addrs ...string) *office {
	o := &office{machine: w.newMachine(name, id, at), network: network}
	for _, a := range addrs {
		o.addrs = append(o.addrs, netip.MustParseAddr(a))
	}
	o.machine.networks = []ztnode.NetworkID{network}
	o.machine.frames = o.receive
	o.svc = &service{w: w, name: name, heard: map[served]claim{}}
	return o
}

func (o *office) mac() ztnode.MAC { return ztnode.MACOf(o.network, o.id.Address()) }

func (o *office) receive(nwid uint64, frames [][]byte) {
	for _, f := range frames {
		if ztnode.NetworkID(nwid) != o.network || len(f) < ethernetLen {
			continue
		}
		var from ztnode.MAC
		copy(from[:], f[6:12])
		b := f[ethernetLen:]
		switch typ := uint16(f[12])<<8 | uint16(f[13]); {
		case typ == unix.ETH_P_ARP && len(b) >= 28 && b[7] == 1 && slices.Contains(o.addrs, addrOf(b[24:28])):
			o.later(frame(from, o.mac(), typ, arp(2, o.mac(), addrOf(b[24:28]), from, addrOf(b[14:18]))))
		case typ == unix.ETH_P_IP:
			if p, ok := parse(b); ok && slices.Contains(o.addrs, p.dst.Addr()) {
				if answer := o.svc.answer(&p); answer != nil && o != o.w.rogue {
					o.later(frame(from, o.mac(), typ, answer))
				}
			}
		}
	}
}

// later sends a frame after what is going on.
func (o *office) later(f []byte) {
	o.w.net.After(time.Millisecond, func() { o.send(o.network, f) })
}

var (
	_ simnet.Node  = (*machine)(nil)
	_ gateway.Node = overlay{}
)
