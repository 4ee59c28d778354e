//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"ztgate/internal/testwait"
	"ztgate/router/admin"
	"ztgate/router/control"
	"ztgate/router/lab"
	"ztgate/router/lab/labtest"
	"ztgate/zerotier/ztnode"
)

// natFilter is a home router's: nothing comes in unasked, and every destination sees
// another port, so that no two hosts behind such routers find each other by themselves.
// miniupnpd adds what it maps.
const natFilter = `table inet filter {
	chain miniupnpd {}
	chain prerouting_miniupnpd {}
	chain postrouting_miniupnpd {}
	chain forward {
		type filter hook forward priority 0; policy drop;
		ct state established,related accept
		iifname "lan" accept
		jump miniupnpd
	}
	chain prerouting {
		type nat hook prerouting priority -100;
		jump prerouting_miniupnpd
	}
	chain postrouting {
		type nat hook postrouting priority 100;
		jump postrouting_miniupnpd
		oifname "wan" masquerade fully-random
	}
}
`

// miniupnpd's configuration; the first is whether it speaks PCP and NAT-PMP, the
// second whether UPnP.
const miniupnpdConf = `ext_ifname=wan
listening_ip=lan
ipv6_disable=yes
enable_natpmp=%s
enable_upnp=%s
secure_mode=yes
upnp_table_name=filter
upnp_nat_table_name=filter
upnp_forward_chain=miniupnpd
upnp_nat_chain=prerouting_miniupnpd
upnp_nat_postrouting_chain=postrouting_miniupnpd
uuid=5e3d3a44-5d4c-4f63-8a43-6d1a0c2a7f11
allow 1024-65535 0.0.0.0/0 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
`

// homes is an internet segment with a root and two homes, each with one host behind a
// router. The segment's addresses are public ones: no router hands out others.
type homes struct {
	*lab.Topology
	routers, hosts [2]*lab.Namespace
	client         [2]*control.Client // of the members on the hosts
	process        [2]*lab.Process
	address        [2]string
	controller     *control.Client // the root's
}

func wan(i int) netip.Addr { return netip.AddrFrom4([4]byte{44, 128, 0, byte(2 + i)}) }

func startHomes(t *testing.T, conf string) *homes {
	t.Helper()
	o := options(t)
	top, err := lab.New(context.Background(), o.Prefix+"homes")
	if err != nil {
		t.Fatal(err)
	}
	h := &homes{Topology: top}
	labtest.End(t, h.Topology)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	namespace := func(name string) *lab.Namespace {
		n, err := h.Namespace(name)
		must(err)
		return n
	}
	inet := namespace("inet")
	must(inet.Bridge("br0"))
	plug := func(n *lab.Namespace, ifname, port string, a netip.Addr) {
		must(lab.Plug(n, ifname, inet, "br0", port))
		must(n.AddAddress(ifname, netip.PrefixFrom(a, 24)))
	}
	root := namespace("root")
	rootAddress := netip.AddrFrom4([4]byte{44, 128, 0, 1})
	plug(root, "eth0", "root", rootAddress)
	for i, name := range []string{"a", "b"} {
		r, host := namespace("router"+name), namespace("host"+name)
		plug(r, "wan", "wan"+name, wan(i))
		must(lab.Connect(r, "lan", host, "eth0"))
		inside := func(last byte) netip.Prefix {
			return netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 168, byte(5 + i), last}), 24)
		}
		must(r.AddAddress("lan", inside(1)))
		must(host.AddAddress("eth0", inside(7)))
		must(host.AddRoute(netip.PrefixFrom(netip.IPv4Unspecified(), 0), inside(1).Addr()))
		must(r.Sysctl("net/ipv4/ip_forward", "1"))
		if out, err := r.Input(h.Context(), natFilter, "nft", "-f", "-"); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		h.routers[i], h.hosts[i] = r, host
	}

	dir, err := h.Home("miniupnpd")
	must(err)
	path := filepath.Join(dir, "miniupnpd.conf")
	must(os.WriteFile(path, []byte(conf), 0o600))
	_, err = h.StartPlain(h.routers[0], "miniupnpd", miniupnpd(t), "-d", "-f", path, "-P", filepath.Join(dir, "daemon.pid"))
	must(err)

	planet := filepath.Join(h.Dir, "planet")
	start := func(n *lab.Namespace, name string, args ...string) (*control.Client, *lab.Process) {
		socket := filepath.Join(h.Dir, name, "ztgate.sock")
		p, err := h.Start(n, name, o.Binary, append(args, "--node", "go", "--listen", "127.0.0.1:9002", "--planet", planet, "--socket", socket)...)
		must(err)
		c := control.NewClient(socket)
		testwait.NoError(t, 30*time.Second, func() error { _, err := c.Info(context.Background()); return err })
		return c, p
	}
	identity := func(name string) string {
		home, err := h.Home(name)
		must(err)
		id, err := admin.NewIdentity(filepath.Join(home, "identity.secret"), filepath.Join(home, "identity.public"), false)
		must(err)
		return id.Address
	}
	identity("root")
	_, err = admin.WritePlanet(admin.PlanetSpec{
		Roots: []string{fmt.Sprintf("%s=%s/9993", filepath.Join(h.Dir, "root", "identity.public"), rootAddress)}, Now: time.Now(),
	}, planet, filepath.Join(h.Dir, "planet.key"), false)
	must(err)
	h.controller, _ = start(root, "root", "member", "--controller")
	for i, name := range []string{"a", "b"} {
		h.address[i] = identity(name)
		h.client[i], h.process[i] = start(h.hosts[i], name, "member", "--tun", "ztm0")
	}
	return h
}

// miniupnpd returns the path of the daemon and skips without it.
func miniupnpd(t *testing.T) string {
	t.Helper()
	for _, name := range []string{"miniupnpd", "/usr/sbin/miniupnpd"} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	t.Skip("miniupnpd is not installed: deploy/install-deps.sh installs the package miniupnpd-nftables")
	return ""
}

// Two members behind routers that allow no hole punching reach each other directly,
// since one of the routers maps a port; when that member ends, so does the mapping.
func TestPortMapping(t *testing.T) {
	for _, c := range []struct{ name, natpmp, upnp, protocol string }{
		{"PCP", "yes", "no", "pcp"},
		{"UPnP", "no", "yes", "upnp"},
	} {
		t.Run(c.name, func(t *testing.T) {
			miniupnpd(t)
			h := startHomes(t, fmt.Sprintf(miniupnpdConf, c.natpmp, c.upnp))
			ctx := h.Context()
			rec, err := h.controller.CreateNetwork(ctx, map[string]any{"private": true, "routes": []any{map[string]any{"target": subnet.String(), "via": nil}}})
			if err != nil {
				t.Fatal(err)
			}
			var named struct {
				ID ztnode.NetworkID `json:"id"`
			}
			if err := json.Unmarshal(rec.Record, &named); err != nil {
				t.Fatal(err)
			}
			id := named.ID.String()
			for i := range h.client {
				if _, err := h.controller.SetMember(ctx, id, h.address[i], map[string]any{"authorized": true, "ipAssignments": []string{overlayOf(i).String()}}); err != nil {
					t.Fatal(err)
				}
				if _, err := h.client[i].Join(ctx, id); err != nil {
					t.Fatal(err)
				}
			}

			var mapped ztnode.PortMapping
			testwait.NoError(t, 30*time.Second, func() error {
				info, err := h.client[0].Info(ctx)
				if err == nil && len(info.PortMappings) != 1 {
					err = fmt.Errorf("mappings: %+v", info.PortMappings)
				}
				if err == nil {
					mapped = info.PortMappings[0]
				}
				return err
			})
			if mapped.External.Addr() != wan(0) || mapped.Protocol != c.protocol || mapped.Gateway.String() != "192.168.5.1" {
				t.Errorf("mapping %+v", mapped)
			}
			metrics, err := h.hosts[0].Run(ctx, "curl", "-sS", "--max-time", "5", "http://127.0.0.1:9002/metrics")
			for _, want := range []string{
				fmt.Sprintf("ztgate_port_mappings{protocol=%q} 1\n", c.protocol), `ztgate_port_mapping_requests_total{result="mapped"} 1`,
			} {
				if err != nil || !strings.Contains(string(metrics), want) {
					t.Errorf("metrics lack %q: %v", want, err)
				}
			}
			if rules := ruleset(t, h); !strings.Contains(rules, fmt.Sprintf("192.168.5.7:%d", mapped.Port)) {
				t.Errorf("the router doesn't lead port %d inside:\n%s", mapped.Port, rules)
			}
			testwait.NoError(t, 30*time.Second, func() error {
				out, err := h.hosts[1].Run(ctx, "ping", "-n", "-c", "1", "-W", "1", overlayOf(0).String())
				if err != nil {
					return fmt.Errorf("%w: %s", err, out)
				}
				return direct(ctx, h.client[1], h.address[0], mapped.External)
			})
			t.Logf("%s by %s; the other reaches it there", mapped.External, mapped.Protocol)
			if info, err := h.client[1].Info(ctx); err != nil || len(info.PortMappings) != 0 || info.TertiaryPort != 0 || !info.PortMapping {
				t.Errorf("behind a router that maps nothing: %+v, %v", info, err)
			}

			h.process[0].Stop()
			if rules := ruleset(t, h); strings.Contains(rules, fmt.Sprintf("192.168.5.7:%d", mapped.Port)) {
				t.Errorf("the mapping is still there:\n%s", rules)
			}
		})
	}
}

// direct returns an error unless a member prefers to reach another at an endpoint.
func direct(ctx context.Context, c *control.Client, other string, at netip.AddrPort) error {
	list, err := c.Peers(ctx)
	if err != nil {
		return err
	}
	for _, p := range list.Peers {
		if p.Address == other && p.Link == "DIRECT" && slices.ContainsFunc(p.Paths, func(pa ztnode.Path) bool { return pa.Preferred && pa.Endpoint == at }) {
			return nil
		}
	}
	return fmt.Errorf("no direct path to %s at %v: %+v", other, at, list.Peers)
}

// ruleset is what the router with the daemon does now.
func ruleset(t *testing.T, h *homes) string {
	t.Helper()
	out, err := h.routers[0].Run(context.Background(), "nft", "-n", "list", "ruleset")
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}
