//go:build libzt && cgo

package gateway

import (
	"context"
	"errors"
	"net/netip"

	"github.com/prometheus/client_golang/prometheus"

	"ztgate/bindings"
	"ztgate/netstack"
	"ztgate/router/fault"
	"ztgate/zerotier/transport"
	"ztgate/zerotier/ztnode"
)

// libztNode is the node on libzt.
type libztNode struct {
	*bindings.Node
	udp *transport.UDP
}

// newLibztNode opens home and the UDP sockets.
func newLibztNode(cfg NodeConfig) (Node, error) {
	if cfg.Controller {
		return nil, fault.Usagef("controller: libzt can't be a network controller: use --node go")
	}
	if u := cfg.Underlay; u.LowBandwidth || u.SealedHello != ztnode.SealedHelloOff || len(u.Physical) > 0 || len(u.Virtual) > 0 {
		return nil, fault.Usagef("underlay settings: libzt doesn't offer them: remove them or use --node go")
	}
	l := &libztNode{}
	var err error
	l.Node, err = bindings.New(bindings.Config{Home: cfg.Home, Planet: cfg.Planet, Networks: cfg.Networks, Logger: cfg.Logger, OnFrames: cfg.OnFrames,
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
		return nil, nodeError(err, bindings.ErrLibrary)
	}
	if cfg.Registerer != nil {
		if err := cfg.Registerer.Register(&libztCollector{l}); err != nil {
			return nil, errors.Join(err, l.Close())
		}
	}
	return l, nil
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

// Controller returns nil: chapter 05 §10.4.
func (l *libztNode) Controller() Controller { return nil }

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
		counter(netstack.DescDropped, n, "overlay", reason)
	}
}
