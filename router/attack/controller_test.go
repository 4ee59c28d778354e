//go:build e2e

package attack

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"time"
	"unicode"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl2"
)

// evilNetwork makes the gateway join a network of a hostile controller, which gives it
// one configuration after the other, and pushes rate more a second.
func (w *world) evilNetwork(rate int, config func(n uint64) *vl2.NetworkConfig) (vl2.NetworkID, attack) {
	h := w.join("controller", "")
	nwid := vl2.NetworkID(uint64(h.id.Address())<<24 | 0x0e)
	h.rules.mu.Lock()
	h.rules.config = func(_ vl2.NetworkID, _ identity.Address, n uint64) *vl2.NetworkConfig { return config(n) }
	h.rules.mu.Unlock()
	return nwid, attack{run: func(ctx context.Context) (int, int) {
		// Not waited for: it answers when the network has a configuration.
		go func() { _, _ = w.GatewayAPI.Join(ctx, nwid.String()) }()
		return pace(ctx, rate, func(int) { h.rules.push(nwid) }), 0
	}}
}

// evil is a configuration with nothing wrong in it.
func evil() *vl2.NetworkConfig {
	return &vl2.NetworkConfig{Name: "evil", MTU: 2800, MulticastLimit: 32, Flags: vl2.FlagBroadcast,
		Addresses: []netip.Prefix{netip.MustParsePrefix("10.66.0.1/24")},
		Routes:    []vl2.Route{{Target: netip.MustParsePrefix("10.66.0.0/24")}},
		Rules:     []vl2.Rule{{Type: vl2.ActionAccept}}}
}

var controllerRows = []row{
	{name: "controller/4,096 routes", prepare: func(w *world) attack {
		_, a := w.evilNetwork(2, func(n uint64) *vl2.NetworkConfig {
			c := evil()
			for i := range 4096 {
				c.Routes = append(c.Routes, vl2.Route{Target: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(100 + n%8), byte(i >> 4), byte(i << 4)}), 28)})
			}
			return c
		})
		return a
	}},
	{name: "controller/routes that cover the VPC and all else", prepare: func(w *world) attack {
		_, a := w.evilNetwork(5, func(n uint64) *vl2.NetworkConfig {
			c := evil()
			for _, p := range []string{"172.31.0.0/28", "172.31.0.10/32", "172.31.0.0/17", "172.31.128.0/17", "172.16.0.0/12", "10.0.0.0/1", "10.0.0.0/8", "10.0.0.10/32",
				"0.0.0.0/0", "0.0.0.0/1", "128.0.0.0/1", "203.0.113.0/24", "203.0.113.1/32", "169.254.169.254/32", "127.0.0.0/8", "22.0.0.0/7"} {
				c.Routes = append(c.Routes, vl2.Route{Target: netip.MustParsePrefix(p)})
			}
			c.Addresses = append(c.Addresses, netip.MustParsePrefix([]string{"172.31.0.10/24", "10.0.0.1/1", "203.0.113.77/24", "10.0.0.10/32"}[n%4]))
			return c
		})
		return a
	}},
	{name: "controller/names with control characters", prepare: func(w *world) attack {
		nwid, a := w.evilNetwork(2, func(n uint64) *vl2.NetworkConfig {
			c := evil()
			c.Name = "\x1b[2J\x1b]0;owned\a\u202egnp.exe\u2066\r\nready <script>alert(1)</script>\x9b" // shown by terminals and pages
			c.DNS = vl2.DNS{Domain: "\x1b[31mevil\u202e", Servers: []netip.Addr{netip.MustParseAddr("10.66.0.53")}}
			return c
		})
		a.check = func() error {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			for _, args := range [][]string{
				{"curl", "-s", "http://" + httpAt + "/"}, {"curl", "-s", "http://" + httpAt + "/metrics"}, {"curl", "-s", "http://" + httpAt + "/readyz"},
				{w.binary, "status", "--socket", w.socketPath()}, {w.binary, "networks", "--socket", w.socketPath()}, {w.binary, "networks", "-j", "--socket", w.socketPath()},
				{"cat", w.GatewayProcess.Log},
			} {
				out, _ := w.Gateway.Run(ctx, args[0], args[1:]...)
				if args[0] == w.binary && args[1] == "networks" && !strings.Contains(string(out), nwid.String()) {
					return fmt.Errorf("%v doesn't show the network: the row tests nothing", args)
				}
				for i, r := range string(out) {
					if r != '\n' && r != '\t' && (unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r)) {
						return fmt.Errorf("%v prints %U at %d", args, r, i)
					}
				}
				if strings.Contains(string(out), "<script>alert") && args[0] == "curl" {
					return fmt.Errorf("%v prints a name as HTML", args)
				}
			}
			return nil
		}
		return a
	}},
	{name: "controller/addresses change ten times a second", prepare: func(w *world) attack {
		_, a := w.evilNetwork(10, func(n uint64) *vl2.NetworkConfig {
			c := evil()
			c.Addresses = []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 66, 0, byte(1 + n%250)}), 24)}
			return c
		})
		return a
	}},
	{name: "controller/subnets and routes change ten times a second", prepare: func(w *world) attack {
		_, a := w.evilNetwork(10, func(n uint64) *vl2.NetworkConfig {
			c := evil()
			c.Addresses = nil
			for i := range 32 {
				c.Addresses = append(c.Addresses, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(70 + i), byte(n), 1}), 24))
			}
			c.Routes = nil
			for i := range 100 {
				c.Routes = append(c.Routes, vl2.Route{Target: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(110 + n%100), byte(i), 0}), 24)})
			}
			return c
		})
		return a
	}},
	{name: "controller/MTU changes ten times a second", prepare: func(w *world) attack {
		_, a := w.evilNetwork(10, func(n uint64) *vl2.NetworkConfig {
			c := evil()
			c.MTU = []int{1280, 10000, 2800, 1281}[n%4]
			return c
		})
		return a
	}},
	{name: "controller/1,024 rules and 256 special members", prepare: func(w *world) attack {
		_, a := w.evilNetwork(5, func(n uint64) *vl2.NetworkConfig {
			c := evil()
			c.Rules = nil
			for range 1023 {
				c.Rules = append(c.Rules, vl2.Rule{Type: vl2.MatchEtherType, Not: true, Field: []byte{8, byte(n)}})
			}
			c.Rules = append(c.Rules, vl2.Rule{Type: vl2.ActionAccept})
			for i := range 256 {
				c.Specialists = append(c.Specialists, vl2.Specialist{Address: identity.Address(0x2200000000 + uint64(i) + n<<8), Roles: vl2.RoleAnchor | vl2.RoleBridge | vl2.RoleReplicator})
			}
			return c
		})
		return a
	}},
}
