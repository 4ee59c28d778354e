package gateway

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"ztgate/router/config"
	"ztgate/router/host"
	"ztgate/router/plan"
	"ztgate/zerotier/ztnode"
)

// An exit comes into force when it has worked, and stays while there is one: past it goes
// nothing, nor past one that takes its place, nor of IPv6 once IPv4 takes one.
func TestExitInForce(t *testing.T) {
	const one, two ztnode.NetworkID = 1, 2
	taps := map[ztnode.NetworkID]*host.TAP{one: {Name: "ztm0"}, two: {Name: "ztm1"}}
	x := &exits{prober: newProber(nil, hostDialer{}, slog.New(slog.DiscardHandler))}
	var list []exitNow
	for i, step := range []struct {
		exits string // VIA in network NETWORK
		up    string // those that answer
		want  string
	}{
		{"", "", ""},
		{"10.1.0.1/1", "", "10.1.0.1 on ztm0"},
		{"10.1.0.1/1", "10.1.0.1", "10.1.0.1 on ztm0 in force"},
		{"10.1.0.1/1", "", "10.1.0.1 on ztm0 in force"}, // it fails
		{"10.2.0.1/2", "", "10.2.0.1 on ztm1 in force"}, // another one instead
		{"fd00::1/1 10.2.0.1/2", "", "10.2.0.1 on ztm1 in force, fd00::1 on ztm0 in force"},
		{"fd00::1/1", "", "fd00::1 on ztm0 in force"},
		{"", "", ""},
		{"10.1.0.1/1", "", "10.1.0.1 on ztm0"}, // from the beginning
		{"10.1.0.1/1 fd00::1/1", "fd00::1", "10.1.0.1 on ztm0, fd00::1 on ztm0 in force"},
		{"10.1.0.1/3", "10.1.0.1", ""}, // its interface couldn't be made
	} {
		p := &plan.Plan{}
		var targets []config.Target
		for _, text := range strings.Fields(step.exits) {
			via, network, _ := strings.Cut(text, "/")
			e := plan.Exit{Via: netip.MustParseAddr(via)}
			_, _ = fmt.Sscan(network, &e.Network)
			p.Exits = append(p.Exits, e)
			targets = append(targets, exitNow{Exit: e}.target())
		}
		x.prober.set(targets)
		for j, target := range targets {
			x.prober.list[j].state.Up = strings.Contains(" "+step.up+" ", " "+target.Addr.Addr().String()+" ")
		}
		list = x.judge(p, taps, list)
		var got []string
		for _, n := range list {
			s := n.Via.String() + " on " + n.device
			if n.inForce {
				s += " in force"
			}
			got = append(got, s)
		}
		if s := strings.Join(got, ", "); s != step.want {
			t.Errorf("step %d: %s, want %s", i, s, step.want)
		}
	}
}

// Whatever a host of the internet answers, be it a refusal, came through the exit.
func TestFirstAnswer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	open := netip.MustParseAddrPort(l.Addr().String())
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, ok := firstAnswer(ctx, hostDialer{}, []netip.AddrPort{open}); !ok {
		t.Error("no answer from who listens")
	}
	_ = l.Close()
	if _, ok := firstAnswer(ctx, hostDialer{}, []netip.AddrPort{open}); !ok {
		t.Error("a refusal is no answer")
	}
	ended, stop := context.WithCancel(t.Context())
	stop()
	if took, ok := firstAnswer(ended, hostDialer{}, []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:443")}); ok {
		t.Errorf("an answer from nobody, after %v", took)
	}
}
