// Package transport is the UDP service of a ZeroTier node (chapter 02 §8): one
// socket per local address and port, batches in both directions, and on Linux
// segmentation offload (GSO, GRO). It knows nothing of the datagrams' content.
//
// [UDP] owns the sockets and follows the addresses of the machine. Each socket
// has one reading goroutine, its worker. Each sending goroutine has its own
// [Sender], which collects datagrams and sends them when flushed.
package transport

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/ztnode"
)

// SocketID names one socket for as long as it exists. 0 means all sockets of
// the destination's address family. Numbers are not used again.
type SocketID = vl1.SocketID

var _ vl1.Out = (*Sender)(nil)

// Limits and times (chapter 02 §8.1, §8.2).
const (
	maxSockets   = 256
	bufferSize   = 4 << 20 // of the kernel, each direction
	rescanAfter  = 30 * time.Second
	rescanPoll   = 5 * time.Second // where the system doesn't announce changes
	rescanSettle = 200 * time.Millisecond
	portLow      = 20000
	portHigh     = 65535
	portTries    = 64
)

// PortInUseError says which port is taken on which address. It matches
// [ztnode.ErrPortInUse].
type PortInUseError struct {
	Endpoint netip.AddrPort
}

func (e *PortInUseError) Error() string {
	return fmt.Sprintf("bind udp %v: %v", e.Endpoint, ztnode.ErrPortInUse)
}

// Is reports whether target is [ztnode.ErrPortInUse].
func (e *PortInUseError) Is(target error) bool { return target == ztnode.ErrPortInUse }

// Config says which sockets to open.
type Config struct {
	Port          int  // primary port, 0 = a free random one
	SecondaryPort int  // 0 = WantSecondary or another one
	WantSecondary int  // a first choice, 0 = none; if it is taken, a free random one
	NoSecondary   bool // primary port only

	// Bind replaces the addresses of the interfaces by a fixed list, which may
	// hold loopback addresses.
	Bind []netip.Addr
	// Exclude, if set, refuses further addresses of interfaces.
	Exclude func(ifname string, addr netip.Addr) bool
	// TCPRelay is a server that carries datagrams over TCP where UDP is blocked,
	// see [DefaultTCPRelay]; the zero value = none. ForceTCPRelay uses nothing else
	// and binds no UDP sockets. Version is told to the server.
	TCPRelay      netip.AddrPort
	ForceTCPRelay bool
	Version       [3]int

	// Mark is that of packets, for the policy routing of the host, on Linux; 0 = none.
	Mark int

	// NoOffload turns GSO and GRO off.
	NoOffload bool
	// OnRescan, if set, is called after the sockets followed a change of the
	// machine's addresses.
	OnRescan func()
	Logger   *slog.Logger // nil = no log
}

// UDP is the set of sockets. Its methods are safe for concurrent use.
type UDP struct {
	cfg   Config
	log   *slog.Logger
	stats counters
	table atomic.Pointer[table]
	watch *addrWatch
	relay *relay // nil = none

	mu      sync.Mutex    // guards what follows and writes of table
	ports   [numPorts]int // 0 = not open
	nextID  SocketID
	closed  bool
	start   func(*socket) // starts a reader, set by Run
	workers []bool        // worker numbers in use
}

// The ports of chapter 02 §8.2.
const (
	primary = iota
	secondary
	tertiary
	numPorts
)

// table is an immutable snapshot of the open sockets.
type table struct {
	all    []*socket
	byID   map[SocketID]*socket
	v4, v6 []*socket
}

func newTable(all []*socket) *table {
	t := &table{all: all, byID: make(map[SocketID]*socket, len(all))}
	for _, s := range all {
		t.byID[s.id] = s
		if s.local.Addr().Is4() {
			t.v4 = append(t.v4, s)
		} else {
			t.v6 = append(t.v6, s)
		}
	}
	return t
}

// family returns the sockets that can send to a.
func (t *table) family(a netip.Addr) []*socket {
	if a.Is4() {
		return t.v4
	}
	return t.v6
}

// place is where a socket should be: an address of an interface. ifname is empty
// if the socket isn't to be bound to a device.
type place struct {
	ifname string
	addr   netip.Addr
}

// Open opens the sockets. An address that can't be used is left out and tried
// again later, except that a fixed port that is taken, or an address of Bind, is
// an error.
func Open(cfg Config) (*UDP, error) {
	u := &UDP{cfg: cfg, log: cfg.Logger, nextID: 1}
	if u.log == nil {
		u.log = slog.New(slog.DiscardHandler)
	}
	u.table.Store(newTable(nil))
	if u.relay = newRelay(&u.cfg, u.log); cfg.ForceTCPRelay {
		if u.relay == nil {
			return nil, errors.New("open udp: a forced TCP relay needs the address of one")
		}
		return u, nil
	}
	if len(cfg.Bind) == 0 {
		u.watch = newAddrWatch() // before the first listing, so that no change is missed
	}
	err := u.openPort(primary, cfg.Port)
	if err == nil && !cfg.NoSecondary {
		if cfg.SecondaryPort != 0 {
			err = u.openPort(secondary, cfg.SecondaryPort)
		} else {
			err = u.openWanted(secondary, cfg.WantSecondary)
		}
	}
	if err != nil {
		return nil, errors.Join(err, u.Close())
	}
	return u, nil
}

// places lists where sockets should be.
func (u *UDP) places() ([]place, error) {
	if len(u.cfg.Bind) > 0 {
		out := make([]place, 0, len(u.cfg.Bind))
		for _, a := range u.cfg.Bind {
			out = append(out, place{addr: a.Unmap()})
		}
		return out, nil
	}
	found, err := localAddresses()
	if err != nil {
		return []place{{addr: netip.IPv4Unspecified()}, {addr: netip.IPv6Unspecified()}}, err
	}
	return slices.DeleteFunc(found, func(p place) bool {
		return excludedInterface(p.ifname) || !usable(p.addr) ||
			u.cfg.Exclude != nil && u.cfg.Exclude(p.ifname, p.addr)
	}), nil
}

// usable reports whether an address can be an end of a path (chapter 02 §8.1).
func usable(a netip.Addr) bool {
	switch packet.ScopeOf(a) {
	case packet.ScopePrivate, packet.ScopePseudoPrivate, packet.ScopeShared, packet.ScopeGlobal:
		return true
	}
	return false
}

// openPort opens port on every place; 0 tries random ports until one is free
// everywhere.
func (u *UDP) openPort(which, port int) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.openPortLocked(which, port)
}

// openWanted opens a port if it is free, else a random one.
func (u *UDP) openWanted(which, want int) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.openWantedLocked(which, want)
}

func (u *UDP) openWantedLocked(which, want int) error {
	err := u.openPortLocked(which, want)
	if want != 0 && errors.Is(err, ztnode.ErrPortInUse) {
		err = u.openPortLocked(which, 0)
	}
	return err
}

func (u *UDP) openPortLocked(which, port int) error {
	places, err := u.places()
	if err != nil {
		u.log.Warn("interfaces can't be listed, using wildcard sockets", "error", err)
	}
	try := port
	for range portTries {
		if port == 0 {
			try = portLow + rand.IntN(portHigh-portLow+1)
		}
		var socks []*socket
		if socks, err = u.openAll(places, try); err == nil {
			u.ports[which] = try
			u.installLocked(socks)
			return nil
		}
		if port != 0 || !errors.Is(err, ztnode.ErrPortInUse) {
			return err
		}
	}
	return err
}

func (u *UDP) openAll(places []place, port int) ([]*socket, error) {
	var socks []*socket
	for _, p := range places {
		if len(u.table.Load().all)+len(socks) >= maxSockets {
			u.log.Warn("too many local addresses, leaving out the rest", "limit", maxSockets)
			break
		}
		s, err := u.open(p, port)
		if err == nil {
			socks = append(socks, s)
			continue
		}
		if errors.Is(err, ztnode.ErrPortInUse) || len(u.cfg.Bind) > 0 {
			for _, s := range socks {
				_ = s.close()
			}
			return nil, err
		}
		u.log.Warn("local address can't be used", "address", p.addr, "interface", p.ifname, "error", err)
	}
	return socks, nil
}

// open opens one socket. Caller holds mu.
func (u *UDP) open(p place, port int) (*socket, error) {
	ep := netip.AddrPortFrom(p.addr, uint16(port))
	s, err := openSocket(p, ep, u.cfg.NoOffload, u.cfg.Mark)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, &PortInUseError{Endpoint: ep}
	}
	if err != nil {
		return nil, fmt.Errorf("open udp socket %v: %w", ep, err)
	}
	s.id, s.place, s.local, s.worker = u.nextID, p, ep, -1
	u.nextID++
	return s, nil
}

// installLocked adds sockets to the table and starts their readers.
func (u *UDP) installLocked(socks []*socket) {
	if len(socks) == 0 {
		return
	}
	u.table.Store(newTable(append(slices.Clone(u.table.Load().all), socks...)))
	for _, s := range socks {
		u.log.Debug("udp socket opened", "endpoint", s.local, "interface", s.ifname, "gso", s.gso.Load(), "gro", s.gro)
		if u.start != nil {
			u.start(s)
		}
	}
}

// removeLocked closes the sockets that gone picks.
func (u *UDP) removeLocked(gone func(*socket) bool) {
	var keep, drop []*socket
	for _, s := range u.table.Load().all {
		if gone(s) {
			drop = append(drop, s)
		} else {
			keep = append(keep, s)
		}
	}
	if len(drop) == 0 {
		return
	}
	u.table.Store(newTable(keep))
	for _, s := range drop {
		u.log.Debug("udp socket closed", "endpoint", s.local, "interface", s.ifname)
		_ = s.close()
	}
}

// Rescan compares the sockets with the addresses of the machine, opens what is
// missing and closes what is gone. Run calls it; there is no need to.
func (u *UDP) Rescan() {
	if u.rescan() && u.cfg.OnRescan != nil {
		u.cfg.OnRescan()
	}
}

// rescan reports whether sockets were opened or closed.
func (u *UDP) rescan() bool {
	if len(u.cfg.Bind) > 0 {
		return false
	}
	places, err := u.places()
	if err != nil {
		u.log.Warn("interfaces can't be listed", "error", err)
		return false
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return false
	}
	before := u.table.Load()
	u.removeLocked(func(s *socket) bool { return s.failed.Load() || !slices.Contains(places, s.place) })
	have := u.table.Load()
	var added []*socket
	for _, p := range places {
		for _, port := range u.openPortsLocked() {
			ep := netip.AddrPortFrom(p.addr, uint16(port))
			if slices.ContainsFunc(have.all, func(s *socket) bool { return s.place == p && s.local == ep }) {
				continue
			}
			if len(have.all)+len(added) >= maxSockets {
				break
			}
			s, err := u.open(p, port)
			if err != nil { // a new address may not be ready yet; the next scan tries again
				u.log.Warn("local address can't be used", "address", p.addr, "interface", p.ifname, "error", err)
				continue
			}
			added = append(added, s)
		}
	}
	u.installLocked(added)
	return u.table.Load() != before
}

// openPortsLocked lists the open ports in the order of their kinds.
func (u *UDP) openPortsLocked() []int {
	return slices.DeleteFunc(slices.Clone(u.ports[:]), func(p int) bool { return p == 0 })
}

// OpenTertiary opens the port that is to be mapped by a NAT, if it isn't open yet,
// and returns it (chapter 02 §8.2): want if that is free, else a random one.
func (u *UDP) OpenTertiary(want int) (int, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch {
	case u.closed:
		return 0, net.ErrClosed
	case u.cfg.ForceTCPRelay:
		return 0, errors.New("open udp: TCP only")
	case u.ports[tertiary] != 0:
		return u.ports[tertiary], nil
	}
	err := u.openWantedLocked(tertiary, want)
	return u.ports[tertiary], err
}

// RebindSecondary moves the secondary port to another random one, for a node that
// has been offline for long (chapter 02 §8.2). It does nothing if the port is
// fixed or there is none.
func (u *UDP) RebindSecondary() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed || u.cfg.SecondaryPort != 0 || u.ports[secondary] == 0 {
		return nil
	}
	old := u.ports[secondary]
	if err := u.openPortLocked(secondary, 0); err != nil {
		return err // and the old one stays
	}
	u.removeLocked(func(s *socket) bool { return int(s.local.Port()) == old })
	return nil
}

// Run reads from all sockets until ctx ends, which is not an error, and follows
// the addresses of the machine. handle gets each datagram, flush ends each batch;
// both are called by the worker's goroutine only. Workers are numbered from 0;
// the number of a closed socket's worker is given to a later one, which starts
// after it has ended. datagram may be changed and is valid until flush returns.
//
// When Run returns all goroutines have ended and the sockets are closed.
func (u *UDP) Run(ctx context.Context, handle func(w int, sock SocketID, from netip.AddrPort, datagram []byte), flush func(w int)) error {
	var readers sync.WaitGroup
	u.mu.Lock()
	if u.closed {
		u.mu.Unlock()
		return fmt.Errorf("run udp: %w", net.ErrClosed)
	}
	u.start = func(s *socket) { // called with mu held
		s.worker = u.takeWorker()
		readers.Go(func() {
			u.read(s, handle, flush)
			u.mu.Lock()
			u.workers[s.worker] = false
			u.mu.Unlock()
		})
	}
	for _, s := range u.table.Load().all {
		u.start(s)
	}
	var number int
	if u.relay != nil {
		number = u.takeWorker()
	}
	u.mu.Unlock()
	if u.relay != nil {
		readers.Go(func() {
			u.relay.run(ctx, func(from netip.AddrPort, d []byte) {
				handle(number, 0, from, d)
				flush(number)
			})
		})
	}

	u.follow(ctx, readers.Go)
	err := u.Close()
	readers.Wait()
	return err
}

func (u *UDP) takeWorker() int {
	w := slices.Index(u.workers, false)
	if w < 0 {
		w = len(u.workers)
		u.workers = append(u.workers, false)
	}
	u.workers[w] = true
	return w
}

// follow rescans when addresses change, until ctx ends.
func (u *UDP) follow(ctx context.Context, spawn func(func())) {
	if u.watch == nil {
		<-ctx.Done()
		return
	}
	changes, every := u.watch.changes(ctx, spawn)
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
		case <-tick.C:
		case <-changes:
			select { // changes come in groups
			case <-ctx.Done():
			case <-time.After(rescanSettle):
			}
		}
		if ctx.Err() != nil {
			return
		}
		u.Rescan()
	}
}

// Close closes all sockets. Run, if it runs, does not end before its context.
func (u *UDP) Close() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return nil
	}
	u.closed = true
	var errs []error
	for _, s := range u.table.Load().all {
		errs = append(errs, s.close())
	}
	u.table.Store(newTable(nil))
	if u.watch != nil {
		errs = append(errs, u.watch.close())
	}
	return errors.Join(errs...)
}

// LocalEndpoints returns the bound addresses and ports.
func (u *UDP) LocalEndpoints() []netip.AddrPort {
	t := u.table.Load()
	out := make([]netip.AddrPort, len(t.all))
	for i, s := range t.all {
		out[i] = s.local
	}
	return out
}

// HasSocket reports whether a socket is open; 0, all of them, always is.
func (u *UDP) HasSocket(id SocketID) bool {
	_, ok := u.table.Load().byID[id]
	return ok || id == 0
}

// Ports returns the primary port and, if they are open, the secondary and the
// tertiary.
func (u *UDP) Ports() []int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.openPortsLocked()
}

// PortNumbers returns the ports by their kind, 0 if one isn't open.
func (u *UDP) PortNumbers() (first, second, third int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.ports[primary], u.ports[secondary], u.ports[tertiary]
}

// SocketInfo describes a socket.
type SocketInfo struct {
	ID        SocketID
	Local     netip.AddrPort
	Interface string // empty if not bound to one
	GSO, GRO  bool   // offloads in use
}

// Sockets lists the open sockets.
func (u *UDP) Sockets() []SocketInfo {
	t := u.table.Load()
	out := make([]SocketInfo, len(t.all))
	for i, s := range t.all {
		out[i] = SocketInfo{ID: s.id, Local: s.local, Interface: s.ifname, GSO: s.gso.Load(), GRO: s.gro}
	}
	return out
}
