//go:build libzt && cgo

package router

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"ztgate/bindings"
	"ztgate/zerotier/transport"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
)

// libztNode is the node on libzt.
type libztNode struct {
	*bindings.Node
	udp *transport.UDP

	mu     sync.Mutex
	expiry map[uint64]certificate
}

// certificate is the end of a network's certificate, and the configuration it
// comes from.
type certificate struct {
	of   []byte
	ends time.Time
}

// newLibztNode opens home and the UDP sockets.
func newLibztNode(cfg NodeConfig) (Node, error) {
	if cfg.Controller {
		return nil, usagef("controller: libzt can't be a network controller: use --node go")
	}
	if u := cfg.Underlay; u.LowBandwidth || len(u.Physical) > 0 || len(u.Virtual) > 0 {
		return nil, usagef("underlay settings: libzt doesn't offer them: remove them or use --node go")
	}
	if err := checkPlanets(cfg); err != nil {
		return nil, err
	}
	l := &libztNode{expiry: map[uint64]certificate{}}
	var err error
	l.Node, err = bindings.New(bindings.Config{Home: cfg.Home, Planet: cfg.Planet, Logger: cfg.Logger, OnFrames: cfg.OnFrames,
		OpenUDP: func(exclude func(netip.Addr) bool) (bindings.UDP, error) {
			u, err := transport.Open(transport.Config{Port: cfg.Port, Logger: cfg.Logger,
				Exclude: func(_ string, a netip.Addr) bool { return exclude(a) }})
			if err != nil {
				return nil, err
			}
			l.udp = u
			return libztUDP{u}, nil
		}})
	if err != nil {
		return nil, libztError(err)
	}
	if cfg.Registerer != nil {
		if err := cfg.Registerer.Register(&libztCollector{l}); err != nil {
			return nil, errors.Join(err, l.Close())
		}
	}
	return l, nil
}

// checkPlanets refuses what the core would silently ignore.
func checkPlanets(cfg NodeConfig) error {
	if cfg.Planet != nil {
		if w, _, err := vl1.ParseWorld(cfg.Planet); err != nil {
			return usagef("planet file invalid: %w", err)
		} else if !w.IsPlanet() {
			return usagef("planet file invalid: it holds a moon")
		}
	}
	path := filepath.Join(cfg.Home, "planet")
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil {
		_, _, err = vl1.ParseWorld(b)
	}
	if err != nil {
		return usagef("planet file invalid: %s: %w: replace it by the planet file of your network, or remove it to use the default", path, err)
	}
	return nil
}

// libztError marks what the operator can set right.
func libztError(err error) error {
	for _, usage := range []error{bindings.ErrHomeUnusable, bindings.ErrIdentityPermissions, bindings.ErrIdentityMismatch,
		bindings.ErrIdentityInvalid, bindings.ErrLibrary} {
		if errors.Is(err, usage) {
			return Usage(err)
		}
	}
	return portError(err)
}

// libztUDP adapts the socket service, which bindings doesn't know.
type libztUDP struct{ *transport.UDP }

func (u libztUDP) Run(ctx context.Context, handle func(int, uint32, netip.AddrPort, []byte), flush func(int)) error {
	return u.UDP.Run(ctx, func(w int, s transport.SocketID, from netip.AddrPort, d []byte) { handle(w, uint32(s), from, d) }, flush)
}

func (u libztUDP) NewSender() bindings.Sender { return libztSender{u.UDP.NewSender()} }

type libztSender struct{ *transport.Sender }

func (s libztSender) Send(socket uint32, to netip.AddrPort, head, data []byte) {
	s.Sender.Send(transport.SocketID(socket), to, head, data)
}

func (s libztSender) SendTTL(socket uint32, to netip.AddrPort, data []byte, ttl int) {
	s.Sender.SendTTL(transport.SocketID(socket), to, data, ttl)
}

func (l *libztNode) Info() NodeInfo {
	i := l.Node.Info()
	v := NodeInfo{Address: i.Address, Identity: i.Identity, Online: i.Online, Version: i.Version, Surface: []netip.AddrPort{}}
	if len(i.Ports) > 0 {
		v.PrimaryPort = i.Ports[0]
	}
	if w, _, err := vl1.ParseWorld(i.Planet); err == nil {
		v.PlanetID, v.PlanetTimestamp = w.ID, w.Timestamp
		v.Root = slices.ContainsFunc(describe(w).Roots, func(r PlanetRoot) bool { return r.Address == i.Address })
	}
	return v
}

func (l *libztNode) Peers() []Peer {
	var out []Peer
	for _, p := range l.Node.Peers() {
		v := Peer{Address: p.Address, Role: p.Role, Version: "-", Latency: latency(p.Latency), Relayed: p.Relayed,
			Cipher: 1, LastReceive: p.LastReceive, Paths: []Path{}}
		if p.Version[0] >= 0 {
			v.Version = fmt.Sprintf("%d.%d.%d", p.Version[0], p.Version[1], p.Version[2])
			if p.Version[0] > 1 || p.Version[1] >= 10 {
				v.Cipher = 3 // the core's choice for peers that understand it
			}
		}
		for _, pa := range p.Paths {
			v.Paths = append(v.Paths, Path{Endpoint: pa.Endpoint, Preferred: pa.Preferred, Expired: pa.Expired,
				LastSend: pa.LastSend, LastReceive: pa.LastReceive, Latency: latency(pa.Latency)})
		}
		out = append(out, v)
	}
	return out
}

func (l *libztNode) Networks() []Network {
	out := []Network{}
	for _, n := range l.Node.Networks() {
		v := Network{ID: NetworkID(n.ID), Name: n.Name, Status: n.Status, Type: n.Type, MAC: n.MAC, MTU: n.MTU,
			Addresses: n.Addresses, DNSDomain: n.DNSDomain, DNSServers: n.DNSServers, Bridge: n.Bridge, Broadcast: n.Broadcast,
			Revision: n.Revision, AuthURL: n.AuthURL, Certificate: l.certificate(n.ID, n.Dictionary)}
		for _, r := range n.Routes {
			v.Routes = append(v.Routes, Route(r))
		}
		out = append(out, v)
	}
	return out
}

// certificate reads the end of our certificate from a configuration, which the
// core doesn't tell.
func (l *libztNode) certificate(id uint64, dictionary []byte) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.expiry[id]
	if bytes.Equal(c.of, dictionary) {
		return c.ends
	}
	c = certificate{of: dictionary}
	if cfg, err := vl2.DecodeNetworkConfig(dictionary); err == nil && cfg.COM != nil {
		c.ends = time.UnixMilli(cfg.COM.Timestamp() + cfg.COM.TimeDelta())
	}
	l.expiry[id] = c
	return c.ends
}

func (l *libztNode) Join(id NetworkID) error { return l.Node.Join(uint64(id)) }

func (l *libztNode) Leave(id NetworkID) error {
	l.mu.Lock()
	delete(l.expiry, uint64(id))
	l.mu.Unlock()
	return l.Node.Leave(uint64(id))
}

func (l *libztNode) SetMulticastGroups(id NetworkID, groups []Group) {
	list := make([]bindings.MulticastGroup, len(groups))
	for i, g := range groups {
		list[i] = bindings.MulticastGroup{MAC: g.MAC, ADI: g.ADI}
	}
	l.Node.SetMulticastGroups(uint64(id), list)
}

// Controller returns nil: chapter 05 §10.4.
func (l *libztNode) Controller() Controller { return nil }

func (l *libztNode) Orbit(id uint64, seed string) error {
	a, err := strconv.ParseUint(seed, 16, 64)
	if err != nil {
		return usagef("seed %q: want the address of one of the moon's roots, 10 hex digits", seed)
	}
	return l.Node.Orbit(id, a)
}

func (l *libztNode) Deorbit(id uint64) (bool, error) {
	_, had := l.Node.Moons()[id]
	return had, l.Node.Deorbit(id)
}

func (l *libztNode) Moons() []Moon {
	out := []Moon{}
	for id, b := range l.Node.Moons() {
		m := Moon{ID: moonID(id), Waiting: true, Roots: []PlanetRoot{}}
		if w, _, err := vl1.ParseWorld(b); err == nil {
			m.Waiting, m.Timestamp, m.Roots = false, w.Timestamp, describe(w).Roots
		}
		out = append(out, m)
	}
	return out
}

// libztCollector reads the node's counters at scrape time.
type libztCollector struct{ n *libztNode }

func (*libztCollector) Describe(chan<- *prometheus.Desc) {}

func (c *libztCollector) Collect(ch chan<- prometheus.Metric) {
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	w, s := c.n.udp.Stats(), c.n.Stats()
	collectWire(w, counter)
	for i, name := range ciphers {
		counter(descCrypto, s.TxBytes[i], name, "tx")
		counter(descCrypto, s.RxBytes[i], name, "rx")
	}
	counter(descFragments, s.TxFragments, "tx", "sent")
	counter(descFragments, s.RxFragments, "rx", "received")
	for reason, n := range map[string]uint64{"node_batch_full": s.Full, "node_refused": s.Refused, "node_oversize": s.Oversize,
		"node_own_mac": s.OwnMAC, "node_no_network": s.NoNetwork} {
		counter(descDropped, n, "overlay", reason)
	}
}
