package conformance

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"ztgate/internal/testwait"
	"ztgate/netstack"
	"ztgate/netstack/policy"
)

// mirroredRouter is the engine the other way round: the inside of the rows is the overlay,
// whose hosts are masqueraded as an address of the VPC, and the outside is the VPC.
type mirroredRouter struct{ *engineRouter }

// outside are the prefixes of the rows' outside.
var outside = []netip.Prefix{prefix("10.77.100.0/24"), prefix("10.77.200.0/23"), prefix("fd77:100::/64"), prefix("fd77:200::/64")}

func newMirroredRouter(t *testing.T, s setup) router {
	if len(s.forwards) > 0 || s.engine != nil || s.prefix6.IsValid() || len(s.network.Exempt) > 0 {
		panic(notHere("for the other direction only"))
	}
	r := &engineRouter{now: time.Unix(1_700_000_000, 0), reg: prometheus.NewRegistry(), done: make(chan error, 1), log: &logLines{}}
	r.dev = &queueDevice{mtu: s.network.MTU, write: func(b []byte) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.onTUN = append(r.onTUN, b)
	}}
	r.dev.cond = sync.NewCond(&r.dev.mu)
	cfg := engineConfig(s)
	cfg.VPC = netstack.VPC{Sources: outside, MTU: s.network.MTU}
	cfg.Policy = policy.New(policy.Accept, []policy.Rule{{Action: policy.Accept, Direction: policy.In}})
	for _, p := range outside {
		switch {
		case p.Addr().Is4() && s.network.Masquerade:
			cfg.Masquerade = append(cfg.Masquerade, netstack.Masquerade{To: p, Address: ro})
		case p.Addr().Is6() && s.network.Masquerade6:
			cfg.Masquerade = append(cfg.Masquerade, netstack.Masquerade{To: p, Address: ro6})
		}
	}
	cfg.Device, cfg.Overlay, cfg.Registerer = r.dev, r, r.reg
	cfg.Logger = slog.New(slog.NewTextHandler(r.log, nil))
	cfg.Now = func() time.Time {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.now
	}
	e, err := netstack.New(cfg)
	if err != nil {
		t.Fatalf("new engine: %v", err)
	}
	r.engine = e
	if err := e.SetNetworks([]netstack.Network{{ID: networkID, MAC: routerMAC, MTU: s.vpcMTU, Addresses: []netip.Prefix{prefix("10.77.1.1/24"), prefix("fd77:1::1/64")},
		Routes: []netstack.Route{{Target: prefix("10.77.2.0/24")}, {Target: prefix("fd77:2::/64")}}}}); err != nil {
		t.Fatalf("set networks: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	go func() { r.done <- e.Run(ctx) }()
	r.dev.push(nil)
	return &mirroredRouter{r}
}

func (*mirroredRouter) name() string { return "ztgate netstack, from the overlay to the VPC" }

func (r *mirroredRouter) inject(s side, frames [][]byte) {
	if s == overlay { // what isn't IP is nothing for the VPC's side
		frames = slices.DeleteFunc(slices.Clone(frames), func(f []byte) bool { return f[12] != 0x08 && f[12] != 0x86 || f[13] == 0x06 })
	}
	if len(frames) > 0 {
		r.engineRouter.inject(1-s, frames)
	}
}

func (r *mirroredRouter) take(s side) [][]byte { return r.engineRouter.take(1 - s) }

// settle is [engineRouter.settle] by a host of the VPC.
func (r *mirroredRouter) settle() {
	if r.slow {
		time.Sleep(20 * time.Millisecond)
		return
	}
	r.seq++
	r.barriers++
	r.dev.push([][]byte{ping(mirroredBarrier, ro, barrierID, r.seq, "")})
	r.slow = !testwait.Poll(20*time.Second, func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		for i, b := range r.onTUN {
			if p := parse(b); p.dst == mirroredBarrier && p.typ == 0 && p.seq == r.seq {
				r.onTUN = append(r.onTUN[:i:i], r.onTUN[i+1:]...)
				return true
			}
		}
		return false
	})
}

var mirroredBarrier = addr("10.77.100.250")

// notMirrored are rows that don't hold the other way round, and why.
var notMirrored = func() map[string]string {
	out := map[string]string{}
	for why, ids := range map[string][]string{
		"members reach each other over the overlay itself":                             {"4787-REQ-9", "4787-REQ-9a", "5508-REQ-7", "5508-REQ-7a", "7857-S13"},
		"errors about a flow come from the member that its packets go to":              {"5508-REQ-5a", "5508-REQ-5b", "5508-REQ-5c", "1812-5.2.7.1n"},
		"the address isn't there for members, who have the gateway's on their network": {"1812-4.3.3.6", "1812-4.2.2.9", "792-b", "4443-4.2", "4443-3.4", "4443-2.2", "1812-4.3.2.4"},
		"the VPC may open flows to members":                                            {"L-DIRECT", "6092-a"},
		"what comes from the VPC has no MAC":                                           {"1812-5.3.4", "1812-5.3.8"},
		"answers to many members at once wait for ARP, as many as may wait":            {"L-DNS"},
	} {
		for _, id := range ids {
			out[id] = why
		}
	}
	return out
}()

// TestMirrored runs the rows the other way round.
func TestMirrored(t *testing.T) {
	for _, q := range requirements {
		t.Run(testName(q), func(t *testing.T) {
			t.Parallel()
			if why := notMirrored[q.id]; why != "" {
				t.Skip(why)
			}
			switch v, evidence := runRow(t, q, newMirroredRouter); v {
			case fails:
				t.Error(evidence)
			case green:
			default:
				t.Skip(evidence)
			}
		})
	}
}

// mirrored runs rows the other way round.
func mirrored(ids ...string) func(*bench) {
	return func(b *bench) {
		if _, ok := b.r.(*mirroredRouter); !ok {
			b.engineOnly()
		}
		b.stop()
		b.make = newMirroredRouter
		same(ids...)(b)
	}
}

// inbound: from the overlay to the VPC, behind an address of the VPC.
func inbound() []row {
	return []row{
		{"IN-MAP", "mapping", mirrored("4787-REQ-1", "4787-REQ-3", "4787-REQ-3a", "5382-REQ-1", "5382-REQ-7", "5508-REQ-1")},
		{"IN-FILTER", "only answers come back", mirrored("4787-REQ-8", "5382-REQ-3", "5382-REQ-4", "L-LEAK")},
		{"IN-ERRORS", "errors of both sides", mirrored("4787-REQ-12", "4787-REQ-12a", "4787-REQ-12b", "4787-REQ-13", "L-TRACE-UDP", "L-TRACE-ICMP", "L-TRACE-6")},
		{"IN-FRAGMENTS", "fragments", mirrored("4787-REQ-13a", "4787-REQ-14")},
		{"IN-TIMERS", "timers", mirrored("4787-REQ-5", "4787-REQ-6", "5382-REQ-5e", "5382-REQ-5t")},
		{"IN-RESTART", "restart", mirrored("L-LOSS-OUT", "L-LOSS-IN", "L-LOSS-COLLIDED")},
	}
}
