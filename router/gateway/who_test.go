package gateway

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ztgate/netstack"
	"ztgate/router/config"
	"ztgate/router/plan"
	"ztgate/zerotier/ztnode"
)

// world is a random configuration, host and set of networks. The address space is
// small so that everything overlaps.
type world struct {
	*rand.Rand
	text string // of the configuration
	cfg  *config.Config
	host plan.Host
	nets []ztnode.Network // in the order in which they were named
}

var (
	worldBases = []string{"10.0.0.0", "10.0.1.0", "10.77.0.0", "172.31.0.0", "172.31.16.0", "172.16.0.0", "192.168.0.0", "169.254.169.254",
		"100.64.0.0", "100.100.100.200", "22.0.0.0", "8.8.8.8", "168.63.129.16", "127.0.0.1", "224.0.0.0", "0.0.0.0"}
	worldBits = []int{0, 1, 7, 8, 12, 16, 17, 20, 24, 24, 24, 25, 28, 32, 32}
)

func (w *world) prefix() netip.Prefix {
	a := netip.MustParseAddr(worldBases[w.IntN(len(worldBases))]).As4()
	if w.IntN(2) == 0 {
		a[3] ^= byte(w.IntN(32))
	}
	return netip.PrefixFrom(netip.AddrFrom4(a), worldBits[w.IntN(len(worldBits))])
}

// tame returns a prefix that an operator would choose.
func (w *world) tame() netip.Prefix {
	a := netip.MustParseAddr([]string{"10.0.0.0", "10.0.1.0", "10.77.0.0", "172.31.0.0", "172.31.16.0", "192.168.0.0"}[w.IntN(6)])
	p, _ := a.Prefix([]int{16, 20, 24, 24, 28}[w.IntN(5)])
	return p
}

func newWorld(t *testing.T, seed uint64) *world {
	w := &world{Rand: rand.New(rand.NewPCG(seed, 7))}
	var b strings.Builder
	b.WriteString("vpc:\n  sources: [")
	for i := range w.IntN(3) {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "%q", w.tame())
	}
	b.WriteString("]\n")
	if w.IntN(3) == 0 {
		a := w.tame().Addr().As4()
		a[3] = byte(w.IntN(256))
		fmt.Fprintf(&b, "  nat_address: [%q]\n", netip.AddrFrom4(a))
	}
	b.WriteString("policy: {rules: [{action: accept, direction: in}]}\nnetworks:\n")
	for i := range 3 {
		fmt.Fprintf(&b, "  - {id: 8056c2e21c00000%d, allow_global: %v, masquerade: %v}\n", i+1, w.IntN(6) == 0, w.IntN(4) > 0)
	}
	b.WriteString("maps: [")
	for i := range w.IntN(3) {
		if i > 0 {
			b.WriteString(", ")
		}
		real := w.tame()
		alias, _ := w.tame().Addr().Prefix(real.Bits())
		fmt.Fprintf(&b, "{hosts: %s, real: %q, alias: %q", []string{"overlay", "overlay", "vpc"}[w.IntN(3)], real, alias)
		if w.IntN(2) == 0 {
			fmt.Fprintf(&b, ", network: 8056c2e21c00000%d", 1+w.IntN(3))
		}
		b.WriteString("}")
	}
	b.WriteString("]\nforwards: [")
	for i := range w.IntN(3) {
		if i > 0 {
			b.WriteString(", ")
		}
		listen := []string{"", w.prefix().Addr().String() + ":"}[w.IntN(2)]
		fmt.Fprintf(&b, "{listen: \"tcp/%s%d\", to: \"%s:443\", from: %s}", listen, 8000+i, w.prefix().Addr(), []string{"vpc", "overlay"}[w.IntN(2)])
	}
	b.WriteString("]\nnat: {addresses: [")
	for i := range w.IntN(4) {
		if i > 0 {
			b.WriteString(", ")
		}
		a := w.tame().Addr()
		for range 1 + w.IntN(3) {
			a = a.Next()
		}
		fmt.Fprintf(&b, "%q", []string{a.String(), w.prefix().Addr().String()}[w.IntN(2)])
	}
	b.WriteString("]}\n")
	w.text = b.String()
	path := filepath.Join(t.TempDir(), fmt.Sprint(seed))
	if err := os.WriteFile(path, []byte(w.text), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Load(config.Sources{Flags: map[string][]string{"config": {path}}})
	if err != nil {
		return nil // listens at nothing, or so
	}
	w.cfg = cfg
	w.host.Routes = append(w.host.Routes, plan.KernelRoute{Target: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("172.31.16.1"), Device: "eth0"})
	for range w.IntN(4) {
		p := w.tame()
		k := plan.KernelRoute{Target: p, Device: "eth1"}
		if w.IntN(3) == 0 {
			k.Via = netip.MustParseAddr("172.31.16.1")
		} else {
			w.host.Addresses = append(w.host.Addresses, plan.HostAddress{Addr: p.Addr().Next(), Device: "eth1"})
		}
		w.host.Routes = append(w.host.Routes, k)
	}
	w.host.Underlay = []netip.Addr{netip.MustParseAddr("172.31.16.1"), w.prefix().Addr()}
	for i := range 3 {
		n := ztnode.Network{ID: ztnode.NetworkID(0x8056c2e21c000001 + uint64(i)), Status: ztnode.StatusOK, MTU: 2800, MAC: ztnode.MAC{2, 0, 0, 0, 0, byte(i)}}
		for range 1 + w.IntN(2) {
			p := w.prefix()
			if w.IntN(3) > 0 {
				p = w.tame()
			}
			n.Addresses = append(n.Addresses, netip.PrefixFrom(p.Addr().Next(), p.Bits()))
		}
		for range w.IntN(4) {
			r := ztnode.Route{Target: w.prefix()}
			switch w.IntN(5) {
			case 0, 1:
				r.Via = n.Addresses[0].Addr().Next()
			case 2:
				r.Via = n.Addresses[0].Addr() // ours: for the other members
			}
			n.Routes = append(n.Routes, r)
		}
		w.nets = append(w.nets, n)
	}
	return w
}

// probes are addresses at the edges of everything that there is.
func (w *world) probes() (out []netip.Addr) {
	seen := map[netip.Addr]bool{}
	add := func(a netip.Addr) {
		if a.IsValid() && a.Is4() && !seen[a] {
			seen[a] = true
			out = append(out, a)
		}
	}
	edges := func(p netip.Prefix) {
		p = p.Masked()
		b := p.Addr().As4()
		for i := p.Bits(); i < 32; i++ {
			b[i/8] |= 0x80 >> (i % 8)
		}
		end := netip.AddrFrom4(b)
		for _, a := range []netip.Addr{p.Addr().Prev(), p.Addr(), p.Addr().Next(), end.Prev(), end, end.Next()} {
			add(a)
		}
	}
	for _, s := range worldBases {
		edges(netip.PrefixFrom(netip.MustParseAddr(s), 32))
	}
	for _, k := range w.host.Routes {
		edges(k.Target)
	}
	for _, s := range w.cfg.VPC.Sources {
		edges(s)
	}
	for _, n := range w.nets {
		for _, p := range n.Addresses {
			add(p.Addr())
			edges(p)
		}
		for _, r := range n.Routes {
			edges(r.Target)
		}
	}
	for _, m := range w.cfg.Maps {
		edges(m.Real)
		edges(m.Alias)
	}
	for _, f := range w.cfg.Forwards {
		add(f.Listen.Addr())
		add(f.To.Addr())
	}
	for _, a := range append(slices.Clone(w.host.Underlay), w.cfg.VPC.NAT.Addresses...) {
		add(a)
	}
	return out
}

// fate is who gets a packet.
type fate struct {
	device  string           // that the kernel sends it to; "" = it ends in this host
	network ztnode.NetworkID // that the forwarding plane sends it to; 0 = none
	server  netip.Addr       // that gets it there
	source  netip.Addr       // that it is masqueraded behind; invalid = it isn't
}

// system is the kernel's table and the forwarding plane of one plan.
type system struct {
	w      *world
	p      *plan.Plan
	engine *netstack.Engine
}

// stubDevice is a device that nobody reads.
type stubDevice struct{}

func (stubDevice) Read([][]byte, []int, int) (int, error) { select {} }
func (stubDevice) Write(b [][]byte, _ int) (int, error)   { return len(b), nil }
func (stubDevice) BatchSize() int                         { return 1 }
func (stubDevice) MTU() (int, error)                      { return 2800, nil }
func (stubDevice) Close() error                           { return nil }

func (stubDevice) WriteFrames(_ uint64, b [][]byte, _ []int, _ int) (int, error) { return len(b), nil }

func (w *world) system(t *testing.T, nets []ztnode.Network) *system {
	t.Helper()
	p := plan.Make(plan.Input{Config: w.cfg, Networks: nets, Host: &w.host})
	e, err := newEngine(w.cfg, p, stubDevice{}, stubDevice{}, netstack.Config{})
	if err == nil {
		err = e.SetNetworks(planeNetworks(w.cfg, p))
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, w)
	}
	return &system{w, p, e}
}

const tunDevice = "ztg0"

// isNAT reports an address that overlay hosts are masqueraded as.
func (s *system) isNAT(a netip.Addr) bool {
	return slices.ContainsFunc(s.p.Announced, func(o plan.Announcement) bool { return o.Addr == a })
}

// kernel is the longest match in the kernel's table, as a loop over all of it.
func (s *system) kernel(dst netip.Addr) string {
	if slices.ContainsFunc(s.w.host.Addresses, func(a plan.HostAddress) bool { return a.Addr == dst }) ||
		slices.ContainsFunc(s.w.cfg.VPC.Address, func(p netip.Prefix) bool { return p.Addr() == dst }) {
		return ""
	}
	device, bits := "unreachable", -1
	for _, k := range s.w.host.Routes {
		if k.Target.Contains(dst) && k.Target.Bits() > bits {
			device, bits = k.Device, k.Target.Bits()
		}
	}
	for _, r := range s.p.Routes {
		// Ours have the smaller metric where both have the same.
		if r.Target.Contains(dst) && r.Target.Bits() >= bits {
			device, bits = tunDevice, r.Target.Bits()
		}
	}
	return device
}

func (s *system) fate(src, dst netip.Addr) fate {
	f := fate{device: s.kernel(dst)}
	if f.device != tunDevice {
		return f
	}
	x := s.engine.Explain(netstack.Question{Protocol: 6, Src: netip.AddrPortFrom(src, 40000), Dst: netip.AddrPortFrom(dst, 443)})
	if x.Verdict == "forward" {
		f.network, f.server = ztnode.NetworkID(x.Network), x.Destination.Addr()
		if !x.NextHop.IsValid() {
			f.network = 0
		}
		if x.SourceHow == "masquerade" {
			f.source = x.Source.Addr()
		}
	}
	return f
}

func (w *world) String() string {
	return fmt.Sprintf("%shost: %+v\nnetworks: %+v", w.text, w.host, w.nets)
}

// brings reports whether a network says that it has an address.
func brings(n ztnode.Network, a netip.Addr) bool {
	return slices.ContainsFunc(n.Addresses, func(p netip.Prefix) bool { return p.Contains(a) }) ||
		slices.ContainsFunc(n.Routes, func(r ztnode.Route) bool { return r.Target.Contains(a) })
}

// ours reports whether the members of a network send to us what is for an address: where
// it is assigned to us, or where of all that could mean it only what leads to us is longest.
func ours(n ztnode.Network, a netip.Addr) bool {
	longest, here, elsewhere := -1, false, false
	say := func(p netip.Prefix, us bool) {
		switch {
		case !p.Contains(a) || p.Bits() < longest || p.Bits() == 0:
			return
		case p.Bits() > longest:
			longest, here, elsewhere = p.Bits(), false, false
		}
		here, elsewhere = here || us, elsewhere || !us
	}
	for _, p := range n.Addresses {
		if p.Addr() == a {
			return true
		}
		say(p, false) // its neighbours ask for it
	}
	for _, r := range n.Routes {
		say(r.Target, slices.ContainsFunc(n.Addresses, func(p netip.Prefix) bool { return p.Addr() == r.Via }))
	}
	return here && !elsewhere
}

// Random worlds: the kernel's table and the forwarding plane together never give a
// packet to somebody whose it isn't.
func TestWhoGetsPackets(t *testing.T) {
	worlds := 1500
	if testing.Short() {
		worlds = 150
	}
	accepted, refused := 0, 0
	for seed := range uint64(worlds) {
		w := newWorld(t, seed)
		if w == nil {
			continue
		}
		fail := func(format string, args ...any) {
			t.Helper()
			t.Fatalf("seed %d: %s\n%s", seed, fmt.Sprintf(format, args...), w)
		}
		alone, all := w.system(t, nil), w.system(t, w.nets)
		some := []*system{alone}
		for i := range w.nets {
			some = append(some, w.system(t, w.nets[:i+1]))
		}
		for _, r := range all.p.Networks {
			accepted += len(r.Routes)
			refused += r.Refused
		}
		client := netip.MustParseAddr("203.0.113.77") // no network says that it has this
		if len(w.cfg.VPC.Sources) > 0 {
			client = w.cfg.VPC.Sources[0].Addr().Next().Next()
		}
		inVPC := func(a netip.Addr) bool {
			return slices.ContainsFunc(w.cfg.VPC.Sources, func(p netip.Prefix) bool { return p.Contains(a) })
		}
		aliased := func(a netip.Addr) bool {
			return slices.ContainsFunc(all.p.Maps, func(m config.AddressMap) bool { return m.Hosts == config.SideOverlay && m.Alias.Contains(a) })
		}
		served := func(a netip.Addr) bool {
			return slices.ContainsFunc(all.p.Forwards, func(f config.Forward) bool { return f.Listen.Addr() == a })
		}
		for _, dst := range w.probes() {
			was, is := alone.kernel(dst), all.kernel(dst)
			f := all.fate(client, dst)
			_, owner, attached := w.foreign(dst)
			switch {
			case slices.Contains(w.host.Underlay, dst) && is != was:
				fail("%s carries the overlay, and went to %q, now to %q", dst, was, is)
			case all.isNAT(dst) && (is != tunDevice || f.network != 0):
				fail("%s is ours, and goes to %q: %+v", dst, is, f)
			case all.isNAT(dst):
			case inVPC(dst) && is == tunDevice:
				fail("%s is in the VPC, and the kernel sends it to us", dst)
			case was == "" && is != "":
				fail("%s is this host's own, and goes to %q", dst, is)
			case attached && is != was:
				fail("%s is in the attached subnet %s, and goes to %q", dst, owner, is)
			case forbidden(dst) && (is == tunDevice || f.network != 0):
				fail("%s may never be forwarded: %+v", dst, f)
			}
			if f.network != 0 {
				i := slices.IndexFunc(w.nets, func(n ztnode.Network) bool { return n.ID == f.network })
				switch {
				case !brings(w.nets[i], f.server):
					fail("%s goes to %s, which never said that it has %s", dst, f.network, f.server)
				case public(f.server) && !w.cfg.Network(f.network).AllowGlobal:
					fail("%s is public, and goes to %s", dst, f.network)
				case forbidden(f.server):
					fail("%s goes to %s", dst, f.server)
				case f.source.IsValid() && !ours(w.nets[i], f.source):
					fail("%s is sent to as %s, which %s doesn't send to us", dst, f.source, f.network)
				case f.source.IsValid() && forbidden(f.source):
					fail("%s is sent to as %s", dst, f.source)
				}
			}
			// Networks that are named later take nothing away.
			for i, s := range some {
				if g := s.fate(client, dst); g.network != 0 && (g.network != f.network || g.server != f.server) && !served(dst) {
					fail("%s went to %+v with the first %d networks, and goes to %+v with all", dst, g, i, f)
				}
			}
			if !aliased(dst) && !served(dst) && f.network != 0 && f.server != dst {
				fail("%s goes to %s, another host", dst, f.server)
			}
			w.fromOverlay(all, dst, inVPC, fail)
			w.untouched(all, dst, inVPC, fail)
		}
	}
	if accepted < worlds || refused < worlds {
		t.Errorf("%d prefixes used and %d refused: the worlds are too tame or too wild", accepted, refused)
	}
}

// foreign returns the longest route of somebody else for an address, except for
// the default route, and whether it is an attached subnet.
func (w *world) foreign(a netip.Addr) (ok bool, target netip.Prefix, attached bool) {
	for _, k := range w.host.Routes {
		if k.Target.Bits() > 0 && k.Target.Contains(a) && (!ok || k.Target.Bits() > target.Bits()) {
			ok, target, attached = true, k.Target, !k.Via.IsValid()
		}
	}
	return ok, target, attached
}

// forbidden are addresses that no router forwards to, and metadata services.
func forbidden(a netip.Addr) bool {
	b := a.As4()
	return b[0] == 0 || b[0] == 127 || b[0] >= 224 || b[0] == 169 && b[1] == 254 ||
		slices.Contains([]string{"100.100.100.200", "168.63.129.16", "192.0.0.192"}, a.String())
}

func public(a netip.Addr) bool {
	b := a.As4()
	return !(b[0] == 10 || b[0] == 172 && b[1]>>4 == 1 || b[0] == 192 && b[1] == 168 || b[0] == 100 && b[1]>>6 == 1 ||
		slices.Contains([]byte{6, 11, 21, 22, 25, 26, 28, 29, 30, 51, 55, 56}, b[0]) ||
		b[0] == 198 && (b[1]>>1 == 9 || b[1] == 51 && b[2] == 100) || b[0] == 192 && b[1] == 0 && b[2] == 2 || b[0] == 203 && b[1] == 0 && b[2] == 113)
}

// fromOverlay: a host of a network only reaches VPC hosts, and never as one of them.
func (w *world) fromOverlay(s *system, src netip.Addr, inVPC func(netip.Addr) bool, fail func(string, ...any)) {
	for _, n := range w.nets {
		for _, dst := range []netip.Addr{netip.MustParseAddr("172.31.0.10"), netip.MustParseAddr("10.0.0.10"), netip.MustParseAddr("169.254.169.254"), netip.MustParseAddr("192.168.0.10")} {
			x := s.engine.Explain(netstack.Question{FromOverlay: true, Network: uint64(n.ID), Protocol: 6, Src: netip.AddrPortFrom(src, 40000), Dst: netip.AddrPortFrom(dst, 443)})
			if x.Verdict != "forward" {
				continue
			}
			switch {
			case x.NextHop.IsValid():
				fail("%s of %s is forwarded to the overlay: %+v", src, n.ID, x)
			case x.SourceMap == nil && len(w.cfg.VPC.NAT.Addresses) > 0 && !s.isNAT(x.Source.Addr()):
				fail("%s of %s is not hidden from the VPC: %+v", src, n.ID, x)
			case inVPC(x.Source.Addr()) && !s.isNAT(x.Source.Addr()):
				fail("%s of %s reaches the VPC as one of its own: %+v", src, n.ID, x)
			case len(w.cfg.VPC.Sources) > 0 && !inVPC(x.Destination.Addr()):
				fail("%s of %s reaches %s, outside of the VPC", src, n.ID, x.Destination)
			case forbidden(x.Destination.Addr()):
				fail("%s of %s reaches %s", src, n.ID, x.Destination)
			case !brings(n, src):
				fail("%s is no host of %s, and is forwarded", src, n.ID)
			}
		}
	}
}

// untouched: what nobody else could mean is used.
func (w *world) untouched(s *system, dst netip.Addr, inVPC func(netip.Addr) bool, fail func(string, ...any)) {
	for i, n := range w.nets {
		for _, a := range n.Addresses {
			p := a.Masked()
			clear := p.Bits() >= 16 && p.Bits() < 31 && a.Addr() != p.Addr() && p.Contains(a.Addr().Next()) && !public(p.Addr()) && !forbidden(p.Addr())
			other := func(q netip.Prefix) { clear = clear && !q.Overlaps(p) }
			for _, k := range w.host.Routes {
				if k.Target.Bits() > 0 {
					other(k.Target)
				}
			}
			for _, h := range w.host.Addresses {
				other(netip.PrefixFrom(h.Addr, 32))
			}
			for _, u := range append(slices.Clone(w.host.Underlay), netip.MustParseAddr("100.100.100.200"), netip.MustParseAddr("100.127.255.1")) {
				other(netip.PrefixFrom(u, 32))
			}
			for _, v := range w.cfg.VPC.Sources {
				other(v)
			}
			for _, a := range w.cfg.VPC.NAT.Addresses {
				other(netip.PrefixFrom(a, 32))
			}
			for _, m := range w.cfg.Maps {
				other(m.Alias)
			}
			for j, o := range w.nets {
				if i == j {
					continue
				}
				for _, q := range o.Addresses {
					other(q)
				}
				for _, r := range o.Routes {
					other(r.Target)
				}
			}
			if clear && p.Contains(dst) && s.kernel(dst) != tunDevice {
				fail("%s of %s is nobody else's, and %s goes to %q", p, n.ID, dst, s.kernel(dst))
			}
		}
	}
}
