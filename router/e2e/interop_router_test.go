//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ztgate/internal/testwait"
	"ztgate/router/control"
	"ztgate/router/lab"
)

// routerImage is what the entry point of zyclonite/zerotier:router does in its default mode, inbound.
const routerImage = `table ip image {
	chain postrouting {
		type nat hook postrouting priority srcnat;
		oifname "eth-vpc" masquerade
	}
	chain forward {
		type filter hook forward priority filter;
		iifname "eth-vpc" oifname "zt*" ct state related,established accept
		iifname "zt*" oifname "eth-vpc" accept
		iifname "eth-vpc" oifname "zt*" drop
	}
}
`

// A router made by the router image becomes a gateway of ours, as the manual says: with the
// home and the variables as they are, in each mode.
func TestInteropRouterImage(t *testing.T) {
	real := reference(t)
	m := mesh(t, "", []lab.MeshMember{{Name: "router", ZeroTierOne: real, Gateway: true}, {Name: "laptop"}})
	id := network(t, m, map[string]any{"routes": []any{map[string]any{"target": subnet.String(), "via": nil},
		map[string]any{"target": "172.31.0.0/24", "via": overlayOf(0).String()}}})
	router, laptop := m.Nodes[0], m.Nodes[1]
	inside, outside := netip.AddrPortFrom(lab.VPCHost, 80), netip.AddrPortFrom(overlayOf(1), 80)
	whoAsks(t, router.VPC, inside)
	whoAsks(t, laptop.NS, outside)
	const own = "172.31.0.1"
	ctx := context.Background()

	// As it was. The host in the LAN has no route back.
	run(t, router.NS, "nft", "delete", "table", "ip", "nat") // that of a gateway made by hand
	if out, err := router.NS.Input(ctx, routerImage, "nft", "-f", "-"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	run(t, router.VPC, "ip", "route", "del", "default")
	awaitAnswer(t, laptop.NS, inside, own)
	run(t, router.VPC, "ip", "route", "add", "default", "via", own)
	if as, err := asked(router.VPC, outside); err == nil {
		t.Errorf("the image is more open than thought: %s", as)
	}
	router.Process.Stop()
	run(t, router.NS, "nft", "delete", "table", "ip", "image")

	socket := filepath.Join(router.Home, "ztgate.sock")
	for _, c := range []struct{ mode, in, out string }{{"inbound", own, ""}, {"outbound", "", overlayOf(0).String()}, {"both", own, overlayOf(0).String()}} {
		t.Run(c.mode, func(t *testing.T) {
			p, err := m.StartPlain(router.NS, "router", "env", "ZEROTIER_ONE_LOCAL_PHYS=eth-vpc", "ZEROTIER_ONE_GATEWAY_MODE="+c.mode, "ZEROTIER_ONE_USE_IPTABLES_NFT=true",
				"PUID=999", "PGID=994", "TZ=Etc/UTC", options(t).Binary, "run", "--home", router.Home, "--socket", socket, "--listen", "", "--config", "")
			if err != nil {
				t.Fatal(err)
			}
			defer p.Stop()
			api := control.NewClient(socket)
			testwait.NoError(t, 60*time.Second, func() error {
				h, err := api.Health(ctx)
				if err == nil {
					err = h.Err()
				}
				return err
			})
			if info, err := api.Info(ctx); err != nil || info.Address != router.Address {
				t.Errorf("%+v, %v: want %s", info, err, router.Address)
			}
			if list, err := api.Networks(ctx); err != nil || len(list.Networks) != 1 || list.Networks[0].ID != id {
				t.Errorf("networks %+v, %v", list, err)
			}
			for _, way := range []struct {
				from *lab.Namespace
				to   netip.AddrPort
				as   string
			}{{laptop.NS, inside, c.in}, {router.VPC, outside, c.out}} {
				if way.as != "" {
					awaitAnswer(t, way.from, way.to, way.as)
				} else if as, err := asked(way.from, way.to); err == nil {
					t.Errorf("%s is reached, by %s", way.to, as)
				}
			}
		})
	}
}

// large is the size of the page /large.
const large = 5 << 20

// whoAsks serves a page that says who asks.
func whoAsks(t *testing.T, n *lab.Namespace, at netip.AddrPort) {
	t.Helper()
	l, err := n.Listen("tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if r.URL.Path == "/large" {
			_, _ = w.Write(make([]byte, large))
			return
		}
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprintln(w, host)
	})}
	t.Cleanup(func() { _ = srv.Close() })
	go func() { _ = srv.Serve(l) }()
}

// asked asks such a server, and returns who that was.
func asked(from *lab.Namespace, at netip.AddrPort) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	out, err := from.Run(ctx, "curl", "-sS", "--max-time", "3", "http://"+at.String()+"/")
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return strings.TrimSpace(string(out)), nil
}

func awaitAnswer(t *testing.T, from *lab.Namespace, at netip.AddrPort, as string) {
	t.Helper()
	testwait.NoError(t, 60*time.Second, func() error {
		got, err := asked(from, at)
		if err == nil && got != as {
			err = fmt.Errorf("%s is asked by %s, want %s", at, got, as)
		}
		return err
	})
}
