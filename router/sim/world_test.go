package sim

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/netstack"
	"ztgate/router/config"
	"ztgate/zerotier/controller"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/simnet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/ztnode"
)

type networkID = ztnode.NetworkID

// The addresses of a world.
var (
	vpcPrefix     = netip.MustParsePrefix("172.31.0.0/16")
	overlayPrefix = netip.MustParsePrefix("10.0.0.0/24")
	routedPrefix  = netip.MustParsePrefix("10.51.0.0/30") // to the gateway, for its clients
	behindPrefix  = netip.MustParsePrefix("10.9.0.0/24")  // behind a member, by a route
	officeAddr    = netip.MustParseAddr("10.0.0.10")
	office2Addr   = netip.MustParseAddr("10.0.0.11")
	behindAddr    = netip.MustParseAddr("10.9.0.5")
	rogueAddr     = netip.MustParseAddr("10.0.0.66")
	gateAddr      = netip.MustParseAddr("10.0.0.1")
	serverAddr    = netip.MustParseAddr("172.31.0.20")
)

// Ports of forwards: of one for overlay hosts into the VPC, and of one the other way.
const (
	inPort, outPort = 5353, 7000
)

// Marks of traffic.
const (
	clientMark = "c" // of a client
	greedyMark = "g" // of a client that floods
	rogueMark  = "r" // of a member to the forward that is for it
	sidesMark  = "s" // of a member to the forward that isn't
	spoofMark  = "f" // of a member under an address of another
)

// world is everything.
type world struct {
	seed uint64
	rand *rand.Rand
	net  *simnet.Net

	planet    []byte
	machines  []*machine
	root, ctl *machine
	gate      *gate
	offices   []*office // in network A
	rogue     *office   // an authorised member that means no good
	server    struct {
		addr netip.Addr
		svc  *service
	}
	clients    []*client
	greedy     *client
	hoarders   []*client
	configs    []*config.Config
	netA, netB networkID

	links map[link]uint32 // datagrams so far
	loss  float64
	cut   map[string]bool // machines that reach nobody
	delay time.Duration
	grain time.Duration // of nodes' timers, a fifth of the others': nobody hurries while nothing goes on

	records    string                               // what the controller said is done
	changes    []func(*controller.Controller) error // that the controller has yet to make
	trouble    int                                  // faults that connections may fail by
	quietSince time.Time                            // when the last of them ended
	hostile    int                                  // pushes that make network B useless
	deaf       *machine                             // hears nothing
	claimed    bool                                 // the rogue says that it has addresses of others
	behindGone time.Duration                        // when the route to behindPrefix has been gone for long enough; 0 = it is there
	revoked    time.Duration                        // when the rogue must no longer be heard; 0 = it may be

	log         eventLog
	findings    []finding
	connections int
	answered    int
	faults      int
	latest      time.Time // of an answer
	pings       []pinged
	watches     int           // times that the pace of clients was changed
	observed    int           // times that health was compared
	slowest     time.Duration // recovery
	recovered   bool
}

type link struct{ from, to netip.AddrPort }

type pinged struct {
	at time.Time
	ok bool
}

// finding is something that must not be.
type finding struct {
	invariant, text string
	at              time.Duration
}

// wellBehaved is how many clients make connections. Each has few flows at a time, less than
// a full table keeps room for.
const wellBehaved = 200

// client returns some well-behaved client.
func (w *world) client() *client { return w.clients[w.rand.IntN(wellBehaved)] }

// recovery is within what time after the last fault everything works again.
const recovery = 150 * time.Second

// eventLog is what has happened. Things that happen at the same time count in any order.
type eventLog struct {
	sum, now uint64
	at       time.Time
	n        int
	recent   []string
	all      func(string)
}

func (l *eventLog) add(at time.Time, line string) {
	h := fnv.New64a()
	_, _ = h.Write([]byte(line))
	if !at.Equal(l.at) {
		l.settle()
		l.at = at
	}
	l.now += h.Sum64()
	l.n++
}

func (l *eventLog) settle() {
	var b [24]byte
	binary.BigEndian.PutUint64(b[:], l.sum)
	binary.BigEndian.PutUint64(b[8:], l.now)
	binary.BigEndian.PutUint64(b[16:], uint64(l.at.UnixNano()))
	h := fnv.New64a()
	_, _ = h.Write(b[:])
	l.sum, l.now = h.Sum64(), 0
}

// event notes something that people want to see.
func (w *world) event(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	w.log.add(w.net.Now, line)
	line = fmt.Sprintf("%12v  %s", w.net.Now.Sub(epoch), line)
	if w.log.recent = append(w.log.recent, line); len(w.log.recent) > 400 {
		w.log.recent = w.log.recent[200:]
	}
	if w.log.all != nil {
		w.log.all(line)
	}
}

// trace notes something that is one of many.
func (w *world) trace(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	w.log.add(w.net.Now, line)
	if w.log.all != nil && *traced {
		w.log.all(fmt.Sprintf("%12v  . %s", w.net.Now.Sub(epoch), line))
	}
}

func (w *world) found(invariant, format string, args ...any) {
	f := finding{invariant, fmt.Sprintf(format, args...), w.net.Now.Sub(epoch)}
	w.event("FOUND %s: %s", invariant, f.text)
	if len(w.findings) < 100 {
		w.findings = append(w.findings, f)
	}
}

const mappingsFile = home + "/nat-mappings.json"

// torn reports whether the file of mappings is still as it was cut: it stays so until
// it can be saved.
func (w *world) torn() bool {
	n := w.gate.disk.files[mappingsFile]
	return n != nil && w.gate.torn != nil && bytes.Equal(n.data, w.gate.torn)
}

// logged judges what a process logs.
func (w *world) logged(m *machine, level slog.Level, msg, attrs string) {
	w.event("%s %s: %s%s", m.name, level, msg, attrs)
	switch {
	case m.name == "gateway" && strings.HasPrefix(msg, "kept ports") && w.torn():
		w.found("disk", "half of the mappings of an earlier run are used")
	case m.name == "gateway" && strings.HasPrefix(msg, "mappings of the last run") && !w.torn():
		w.found("disk", "the file of mappings is damaged:%s", attrs)
	}
}

// newWorld makes a world; nothing happens in it before run.
func newWorld(seed uint64, ids []*identity.Identity, configs []*config.Config) *world {
	w := &world{seed: seed, rand: rand.New(rand.NewPCG(seed, 1)), net: simnet.New(), links: map[link]uint32{}, cut: map[string]bool{}, configs: configs}
	// Without the length: what LZ4 makes of the same bytes depends on what its table, which
	// is used again, held before.
	w.net.Seen = func(from, to netip.AddrPort, _ []byte) { w.trace("wire %s %s", from, to) }
	w.net.Drop, w.net.Delay = w.drop, w.late
	const rootAt = "93.184.1.1:9993"
	planet := vl1.NewPlanet(1, 1, []vl1.Root{{Identity: ids[0].Public(), Endpoints: []netip.AddrPort{netip.MustParseAddrPort(rootAt)}}}, vl1.Key{})
	w.planet = planet.Append(nil)
	w.netA, w.netB = networkID(uint64(ids[1].Address())<<24|1), networkID(uint64(ids[1].Address())<<24|2)
	w.root = w.newMachine("root", ids[0], rootAt)
	w.ctl = w.newMachine("controller", ids[1], "93.184.1.2:9993")
	w.ctl.controller = true
	w.gate = w.newGate(ids[2], "93.184.2.9:9993")
	w.gate.cfg = configs[0]
	w.offices = []*office{
		w.newOffice("office", ids[3], "93.184.2.10:9993", w.netA, officeAddr.String(), behindAddr.String()),
		w.newOffice("office2", ids[4], "93.184.2.11:9993", w.netA, office2Addr.String()),
	}
	w.rogue = w.newOffice("rogue", ids[5], "93.184.2.66:9993", w.netA, rogueAddr.String())
	for i := range wellBehaved {
		w.newClient(netip.AddrFrom4([4]byte{172, 31, 1, byte(10 + i)}).String())
	}
	w.greedy = w.newClient("172.31.0.66")
	for i := range hoarders {
		w.hoarders = append(w.hoarders, w.newClient(netip.AddrFrom4([4]byte{172, 31, 0, byte(70 + i)}).String()))
	}
	w.server.addr, w.server.svc = serverAddr, &service{w: w, name: "server", heard: map[served]claim{}}
	w.quietSince = w.net.Now
	return w
}

// administer changes records of the controller, as soon as it runs and can write.
func (w *world) administer(f func(c *controller.Controller) error) {
	w.changes = append(w.changes, f)
	if len(w.changes) == 1 {
		w.administrate()
	}
}

func (w *world) administrate() {
	for len(w.changes) > 0 {
		done := false
		if w.ctl.node != nil {
			w.ctl.do(func() {
				err := w.changes[0](w.ctl.node.Controller())
				invalid := errors.Is(err, controller.ErrInvalid) // which a hostile administrator tries too
				if err != nil && !w.ctl.disk.full && !invalid {
					w.found("administer", "%v", err)
				}
				if done = err == nil || invalid; done {
					w.records = w.recorded()
				}
				w.ctl.port.Wake()
			})
		}
		w.settle()
		if !done {
			w.net.After(time.Second, w.administrate)
			return
		}
		w.changes = w.changes[1:]
	}
}

// recorded is what the controller has been told, as text.
func (w *world) recorded() string {
	var b strings.Builder
	c := w.ctl.node.Controller()
	for _, n := range c.Networks() {
		fmt.Fprintln(&b, n.ID, n.MTU, n.Routes)
		for _, m := range c.Members(n.ID) {
			fmt.Fprintln(&b, m.Address, m.Authorized, m.IPAssignments)
		}
	}
	return b.String()
}

// checkRecords checks that a controller that was started knows what it said was done.
func (w *world) checkRecords() {
	if got := w.recorded(); w.records != "" && got != w.records {
		w.found("disk", "the controller knows\n%snot\n%s", got, w.records)
	}
}

func (w *world) authorize(n networkID, m *machine, yes bool, addrs ...netip.Addr) {
	w.administer(func(c *controller.Controller) error {
		_, err := c.UpdateMember(n, m.id.Address(), func(r *controller.Member) error {
			r.Authorized = yes
			if addrs != nil {
				r.IPAssignments = addrs
			}
			return nil
		})
		return err
	})
}

func (w *world) routes(n networkID, routes ...controller.Route) {
	w.administer(func(c *controller.Controller) error {
		_, err := c.UpdateNetwork(n, func(r *controller.Network) error { r.Routes = routes; return nil })
		return err
	})
}

func route(target string, via ...netip.Addr) controller.Route {
	r := controller.Route{Target: netip.MustParsePrefix(target)}
	if len(via) > 0 {
		r.Via = via[0]
	}
	return r
}

var (
	routesA = []controller.Route{route("10.0.0.0/24"), route("10.9.0.0/24", officeAddr), {Target: routedPrefix, Via: gateAddr}}
	routesB = []controller.Route{route("10.88.0.0/24")}
)

// boot starts everything for the first time.
func (w *world) boot() {
	w.root.start()
	w.ctl.start()
	for n, routes := range map[networkID][]controller.Route{w.netA: routesA, w.netB: routesB} {
		w.administer(func(c *controller.Controller) error {
			rec := controller.DefaultNetwork()
			rec.ID, rec.Routes = n, routes
			_, err := c.CreateNetwork(rec)
			return err
		})
	}
	w.authorize(w.netA, w.gate.machine, true, gateAddr)
	w.authorize(w.netA, w.offices[0].machine, true, officeAddr)
	w.authorize(w.netA, w.offices[1].machine, true, office2Addr)
	w.authorize(w.netA, w.rogue.machine, true, rogueAddr)
	w.authorize(w.netB, w.gate.machine, true, netip.MustParseAddr("10.88.0.1"))
	for _, o := range w.offices {
		o.start()
	}
	w.rogue.start()
	w.gate.start()
	w.settle()
}

// disturb says that connections may fail from now on, until end is called.
func (w *world) disturb() (end func()) {
	w.trouble++
	return func() {
		w.trouble--
		w.settle()
	}
}

// settle says that something was changed that may take a while.
func (w *world) settle() { w.quietSince = w.net.Now }

// calm reports that nothing is wrong any more that could make connections fail.
func (w *world) calm() bool {
	return w.trouble == 0 && len(w.changes) == 0 && w.net.Now.Sub(w.quietSince) >= recovery
}

// drop loses datagrams: the n-th of a link always does, or doesn't.
func (w *world) drop(from, to netip.AddrPort, d []byte) bool {
	k := link{from, to}
	w.links[k]++
	if w.deaf != nil && w.deaf.at == to {
		return true
	}
	if len(w.cut) > 0 {
		for _, m := range w.machines {
			if w.cut[m.name] && (m.at == from || m.at == to) {
				return true
			}
		}
	}
	if w.loss == 0 {
		return false
	}
	return w.chance(k) < w.loss
}

// chance is a number below 1 that depends on the seed, the link and how much it has
// carried.
func (w *world) chance(k link) float64 {
	h := fnv.New64a()
	fmt.Fprint(h, w.seed, k.from, k.to, w.links[k])
	return float64(h.Sum64()>>11) / (1 << 53)
}

func (w *world) late(from, to netip.AddrPort, _ []byte) time.Duration {
	if w.delay == 0 {
		return 0
	}
	return time.Duration(w.chance(link{to, from}) * float64(w.delay))
}

// ownAddress reports an address that a network may see of the gateway. It keeps one that
// was taken from it until it hears of that.
func (w *world) ownAddress(n networkID, a netip.Addr) bool {
	if n == w.netA {
		return overlayPrefix.Contains(a) && a != officeAddr && a != office2Addr && a != rogueAddr
	}
	return !vpcPrefix.Contains(a) && !overlayPrefix.Contains(a)
}

// toGateway looks at frames that the gateway gets.
func (w *world) toGateway(nwid uint64, frames [][]byte) {
	for _, f := range frames {
		w.trace("in %x %d", nwid&0xff, len(f))
	}
}

// heard is told of packets with a token that came to a server.
func (w *world) heard(server, mark string, p *packet) {
	inside := server == "server"
	switch {
	case inside && mark == spoofMark && vpcPrefix.Contains(p.src.Addr()):
		w.found("spoof", "the VPC gets a packet of a member as %s", p.src)
	case mark == sidesMark:
		w.found("sides", "%s gets what a member sent to a forward for the VPC, from %s", server, p.src)
	case inside && mark == clientMark:
		w.found("sides", "%s gets what a client sent to a forward for the overlay, from %s", server, p.src)
	case inside && mark == rogueMark && w.revoked != 0 && w.net.Now.Sub(epoch) > w.revoked:
		w.found("revoked", "the VPC hears %s, which was de-authorised", p.src)
	}
}

// checkKernel checks where the kernel sends packets.
func (w *world) checkKernel() {
	k := w.gate.kernel
	for _, s := range []string{"172.31.0.10", "172.31.1.10", "172.31.0.20", "172.31.16.1", "172.31.16.9", "172.31.17.5", "93.184.1.1", "93.184.2.10", "169.254.169.254",
		"8.8.8.8", "23.1.1.1", "31.1.1.1", "7.1.1.1", "192.168.5.5", "10.50.0.1", "127.0.0.1", "224.0.0.1", "100.100.100.200"} {
		if a := netip.MustParseAddr(s); k.way(a) == tunIndex {
			w.found("kernel", "packets to %s come to the gateway", a)
		}
	}
	if way := k.way(officeAddr); way == ethIndex && w.gate.served {
		w.found("kernel", "packets to %s follow the default route", officeAddr)
	}
	if w.behindGone != 0 && w.net.Now.Sub(epoch) > w.behindGone && k.way(behindAddr) == tunIndex {
		w.found("stale", "the kernel has the route to %s, which was withdrawn", behindAddr)
	}
	if len(k.routes) > 100 {
		w.found("bounds", "%d routes in the kernel", len(k.routes))
	}
}

// readyWithin is how long ready may differ from what a client sees: a probe, its
// time-out, and as much again for what is on its way.
const readyWithin = 20 * time.Second

// observe compares what the gateway says with what a client sees.
func (w *world) observe() {
	if w.gate.st == nil {
		return
	}
	limit := w.gate.cfg.NAT.MaxFlows
	n, _ := w.gate.st.Plane().Load()
	if w.observed++; w.observed%10 == 0 { // what is there, and not only what is counted
		n = max(n, len(w.gate.st.Plane().Flows(netstack.FlowFilter{})))
	}
	if n > limit {
		w.found("bounds", "%d flows of at most %d", n, limit)
	}
	if n := len(w.gate.disk.files); n > 200 {
		w.found("bounds", "%d files in the gateway's home", n)
	}
	from := w.net.Now.Add(-readyWithin)
	if w.gate.readySince.After(from) {
		return
	}
	if len(w.pings) == 0 || w.pings[0].at.After(from) {
		return
	}
	all := func(ok bool) bool {
		n := 0
		for _, p := range w.pings {
			if p.at.After(from) && p.ok != ok {
				return false
			} else if p.at.After(from) {
				n++
			}
		}
		return n >= 5
	}
	switch {
	case w.gate.ready && all(false):
		w.found("ready", "the gateway says that it is ready, and no client was served for %v", readyWithin)
	case !w.gate.ready && all(true) && w.calm() && w.hostile == 0:
		w.found("ready", "the gateway says that it isn't ready, and every client was served for %v: %v", readyWithin, w.gate.st.Health().Reasons)
	}
}

// ping is the client that readiness is measured by.
func (w *world) ping() {
	at := w.net.Now
	w.client().connect(unix.IPPROTO_ICMP, netip.AddrPortFrom(officeAddr, 0), func(ok bool) {
		w.pings = append(w.pings, pinged{at, ok})
		w.pings = w.pings[max(0, len(w.pings)-20):]
		w.gate.served = w.gate.served || ok && w.gate.st != nil
	})
}
