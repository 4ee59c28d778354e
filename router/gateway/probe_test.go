package gateway

import (
	"context"
	"log/slog"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"ztgate/router/config"
)

// TestProberSet: other targets are shown from the moment they are set, before any of
// them is probed, and those that stay keep their state.
func TestProberSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		at := func(addr string) config.Target {
			return config.Target{Scheme: "icmp", Addr: netip.AddrPortFrom(netip.MustParseAddr(addr), 0)}
		}
		named := func(addr string) config.Target {
			x := at(addr)
			x.Host = "office"
			return x
		}
		p := newProber([]config.Target{at("10.0.0.1"), named("10.0.0.2")}, nil, slog.New(slog.DiscardHandler))
		probes := map[string]int{}
		p.send = func(_ context.Context, x config.Target) (probed, error) {
			p.mu.Lock()
			defer p.mu.Unlock()
			probes[x.Addr.Addr().String()]++
			return probed{took: time.Millisecond}, nil
		}
		shown := func() (out []string) {
			for _, s := range p.states() {
				state := "down"
				if s.Up {
					state = "up"
				}
				out = append(out, s.Target+" "+state)
			}
			return out
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- p.Run(ctx) }()
		synctest.Wait()
		if d := cmp.Diff([]string{"icmp://10.0.0.1 up", "icmp://office up"}, shown()); d != "" {
			t.Error(d)
		}
		p.set([]config.Target{at("10.0.0.3"), named("10.0.0.4")})
		if d := cmp.Diff([]string{"icmp://10.0.0.3 down", "icmp://office up"}, shown()); d != "" {
			t.Error("after set:", d)
		}
		synctest.Wait()
		if d := cmp.Diff([]string{"icmp://10.0.0.3 up", "icmp://office up"}, shown()); d != "" {
			t.Error("after their probes:", d)
		}
		time.Sleep(3 * probeEvery)
		p.set(nil)
		time.Sleep(3 * probeEvery)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if d := cmp.Diff(map[string]int{"10.0.0.1": 1, "10.0.0.2": 1, "10.0.0.3": 4, "10.0.0.4": 4}, probes); d != "" {
			t.Error("probes:", d)
		}
	})
}
