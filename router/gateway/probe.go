package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sync/errgroup"

	"ztgate/router/config"
	"ztgate/router/control"
)

// Probing of targets.
const (
	probeEvery   = 5 * time.Second
	probeHurry   = 250 * time.Millisecond // until a target has answered once
	probeTimeout = 3 * time.Second
)

// prober probes the targets through the data path.
type prober struct {
	targets []config.Target
	dialer  dialer
	log     *slog.Logger
	onDone  func(t config.Target, up bool, d time.Duration) // called after each probe; may be nil
	changed func()                                          // a target went up or down; may be nil

	mu     sync.Mutex // guards targets too, outside of Run
	state  []control.TargetState
	change chan []config.Target
}

func newProber(targets []config.Target, d dialer, log *slog.Logger) *prober {
	p := &prober{dialer: d, log: log, change: make(chan []config.Target, 1)}
	p.replace(targets)
	return p
}

// replace takes other targets; those that stay keep their state.
func (p *prober) replace(targets []config.Target) {
	p.mu.Lock()
	defer p.mu.Unlock()
	state := make([]control.TargetState, len(targets))
	for i, t := range targets {
		state[i] = control.TargetState{Target: t.String(), Error: "not probed yet"}
		for _, old := range p.state {
			if old.Target == state[i].Target {
				state[i] = old
			}
		}
	}
	p.targets, p.state = targets, state
}

// set makes Run probe other targets from now on.
func (p *prober) set(targets []config.Target) {
	select {
	case <-p.change: // not taken yet, and out of date
	default:
	}
	p.change <- targets
}

// Run probes every target until ctx ends.
func (p *prober) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		g, gctx := errgroup.WithContext(ctx)
		gctx, cancel := context.WithCancel(gctx)
		for i := range p.targets {
			g.Go(func() error { p.loop(gctx, i); return nil })
		}
		select {
		case <-ctx.Done():
			cancel()
			return g.Wait()
		case targets := <-p.change:
			cancel()
			if err := g.Wait(); err != nil {
				return err
			}
			p.replace(targets)
		}
	}
	return nil
}

func (p *prober) loop(ctx context.Context, i int) {
	wait := probeHurry
	for {
		if p.probe(ctx, i) {
			wait = probeEvery
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

func (p *prober) probe(ctx context.Context, i int) bool {
	t := p.targets[i]
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	began := time.Now()
	var err error
	d := time.Duration(0)
	if !t.Addr.Addr().IsValid() {
		err = fmt.Errorf("the name %s has no address yet", t.Host)
	} else if t.Scheme == "icmp" {
		d, err = p.dialer.Ping(ctx, t.Addr.Addr())
	} else {
		var c net.Conn
		if c, err = p.dialer.DialTCP(ctx, t.Addr); err == nil {
			d = time.Since(began)
			_ = c.Close()
		}
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return false // we are stopping: says nothing about the target
	}
	p.record(i, err, d, time.Now())
	if p.onDone != nil {
		p.onDone(t, err == nil, d)
	}
	return err == nil
}

func (p *prober) record(i int, err error, d time.Duration, now time.Time) {
	p.mu.Lock()
	s := &p.state[i]
	flipped := s.Up != (err == nil)
	s.Up, s.Error, s.ConnectMS = err == nil, "", milliseconds(d)
	if err != nil {
		s.Error = err.Error()
	}
	if flipped {
		s.LastChange = now
	}
	p.mu.Unlock()
	if !flipped {
		return
	}
	if err == nil {
		p.log.Info("target up", "target", p.targets[i], "connect", d.Round(time.Microsecond))
	} else {
		p.log.Warn("target down", "target", p.targets[i], "error", err)
	}
	if p.changed != nil {
		p.changed()
	}
}

func (p *prober) states() []control.TargetState {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]control.TargetState{}, p.state...)
}

func (p *prober) health() (bool, string) {
	var down []string
	for _, s := range p.states() {
		if !s.Up {
			down = append(down, fmt.Sprintf("target %s: %s", s.Target, s.Error))
		}
	}
	return len(down) == 0, strings.Join(down, "; ")
}

// hostDialer uses the kernel's stack, as a member does.
type hostDialer struct{}

func (hostDialer) DialTCP(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "tcp", dst.String())
}

// dialHost connects by the kernel's stack.
func dialHost(ctx context.Context, network string, dst netip.AddrPort) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, network, dst.String())
}

// Ping sends one echo request. It needs the right to open raw sockets.
func (hostDialer) Ping(ctx context.Context, dst netip.Addr) (time.Duration, error) {
	network, proto := "ip4:icmp", 1
	var request, reply icmp.Type = ipv4.ICMPTypeEcho, ipv4.ICMPTypeEchoReply
	if dst.Is6() {
		network, proto = "ip6:ipv6-icmp", 58
		request, reply = ipv6.ICMPTypeEchoRequest, ipv6.ICMPTypeEchoReply
	}
	c, err := net.Dial(network, dst.String())
	if err != nil {
		return 0, err
	}
	defer c.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := c.SetDeadline(deadline); err != nil {
			return 0, err
		}
	}
	began := time.Now()
	id, seq := os.Getpid()&0xffff, began.Nanosecond()&0xffff
	msg := icmp.Message{Type: request, Body: &icmp.Echo{ID: id, Seq: seq, Data: []byte("ztgate")}}
	b, err := msg.Marshal(nil)
	if err != nil {
		return 0, err
	}
	if _, err := c.Write(b); err != nil {
		return 0, err
	}
	buf := make([]byte, 1500)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return 0, err
		}
		m, err := icmp.ParseMessage(proto, buf[:n])
		if err != nil || m.Type != reply {
			continue
		}
		if e, ok := m.Body.(*icmp.Echo); ok && e.ID == id && e.Seq == seq {
			return time.Since(began), nil
		}
	}
}
