package gateway_test

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"ztgate/internal/testwait"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/gateway/gatewaytest"
)

// vpcClient is a host of the VPC, in a namespace of its own.
type vpcClient chan func()

// newVPCClient makes one behind vpc0, which has 172.31.0.1.
func newVPCClient(t *testing.T, nl *netlink.Handle) vpcClient {
	t.Helper()
	c, failed := make(vpcClient), make(chan error)
	var ns netns.NsHandle
	go func() {
		runtime.LockOSThread() // for ever: the thread ends with this goroutine
		var err error
		ns, err = netns.New()
		failed <- err
		for f := range c {
			f()
		}
	}()
	if err := <-failed; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { close(c); _ = ns.Close() })
	if err := nl.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "vpc0"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns)}); err != nil {
		t.Fatal(err)
	}
	setUp(t, nl, "vpc0", "172.31.0.1/24")
	inside, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer inside.Close()
	setUp(t, inside, "eth0", "172.31.0.10/24")
	_, dst, err := net.ParseCIDR("10.0.0.0/8")
	if err != nil {
		t.Fatal(err)
	}
	if err := inside.RouteAdd(&netlink.Route{Dst: dst, Gw: net.IPv4(172, 31, 0, 1)}); err != nil {
		t.Fatal(err)
	}
	return c
}

// connect connects to an address.
func (c vpcClient) connect(addr string) error {
	done := make(chan error)
	c <- func() {
		conn, err := net.DialTimeout("tcp", addr, 3*time.Second)
		if err == nil {
			_ = conn.Close()
		}
		done <- err
	}
	return <-done
}

// TestPacketIngress: packets are taken from the VPC's interface itself, and nothing of the
// host changes.
func TestPacketIngress(t *testing.T) { inNamespace(t, testPacketIngress) }

func testPacketIngress(t *testing.T, nl *netlink.Handle) {
	sysctl(t, "ipv4/ip_forward", "0")
	client := newVPCClient(t, nl)
	g, cfg, _, office := startInVPC(t, map[string][]string{"ingress": {"auto"}, "interface": {"vpc0"}, "target": {"tcp://10.0.0.10:443"}})
	ctx := t.Context()
	explain := func(src, dst string) control.Explanation {
		t.Helper()
		x, err := g.client.Explain(ctx, control.Question{Protocol: "tcp", Source: netip.MustParseAddrPort(src), Destination: netip.MustParseAddrPort(dst)})
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	t.Run("nothing of the host changes", func(t *testing.T) {
		if _, err := nl.LinkByName("ztgt5"); err == nil {
			t.Error("there is a TUN")
		}
		if list := guards(nl); len(list) > 0 {
			t.Errorf("there are routes: %q", list)
		}
	})
	t.Run("status", func(t *testing.T) {
		// A first probe in the moment between plane and plan starts behind the interface.
		st, err := g.client.Status(ctx)
		testwait.Poll(patience, func() bool {
			st, err = g.client.Status(ctx)
			return err == nil && st.Targets[0].Through == "ingress"
		})
		if err != nil {
			t.Fatal(err)
		}
		if st.Ingress == nil || st.Ingress.Kind != "packet" || st.Ingress.Interface != "vpc0" || !strings.Contains(st.Ingress.From, "auto: the kernel forwards no packets") {
			t.Errorf("%+v", st.Ingress)
		}
		if st.Targets[0].Through != "ingress" || st.Networks[0].Device != "vpc0" {
			t.Errorf("%+v, %+v", st.Targets[0], st.Networks[0])
		}
		if health := st.Health; health.State != control.Ready {
			t.Errorf("%+v", health.Failed())
		}
	})
	t.Run("clients", func(t *testing.T) {
		if err := client.connect("10.0.0.10:443"); err != nil {
			t.Error(err)
		}
		office.Refuse(true)
		if err := client.connect("10.0.0.10:443"); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("connection to a closed port: %v", err)
		}
		office.Refuse(false)
	})
	t.Run("explain", func(t *testing.T) {
		for _, tt := range []struct{ src, dst, verdict, reason, says string }{
			{"172.31.0.10:0", "10.0.0.10:443", "forward", "", ""},
			{"172.31.0.10:0", "10.9.0.10:443", "elsewhere", "host_route", "no network has a route"},
			{"172.31.0.10:0", "172.31.0.1:443", "local", "", "ends in this host"},
			{"172.31.0.1:0", "10.0.0.10:443", "drop", "host_route", "no way to the overlay"},
			{"192.168.9.9:0", "10.0.0.10:443", "drop", "source_not_allowed", ""},
		} {
			x := explain(tt.src, tt.dst)
			if x.Verdict != tt.verdict || x.Reason != tt.reason || !strings.Contains(x.Detail, tt.says) {
				t.Errorf("%s to %s: %s %q (%s), want %s %q (%s)", tt.src, tt.dst, x.Verdict, x.Reason, x.Detail, tt.verdict, tt.reason, tt.says)
			}
		}
	})
	t.Run("doctor", func(t *testing.T) {
		d, err := g.client.Doctor(ctx, control.DiagnosisRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range d.Links {
			if l.State == control.LinkBroken || l.State == control.LinkDegraded {
				t.Errorf("%+v", l)
			}
		}
	})
	t.Run("a kernel that forwards", func(t *testing.T) {
		sysctl(t, "ipv4/ip_forward", "1")
		testwait.For(t, patience, "routes that discard the kernel's copies", func() bool { return slices.Contains(guards(nl), "10.0.0.0/24") })
		testwait.For(t, patience, "readiness", func() bool { code, _ := readiness(t, cfg); return code == http.StatusOK })
		if err := client.connect("10.0.0.10:443"); err != nil {
			t.Error(err)
		}
		sysctl(t, "ipv4/ip_forward", "0")
		testwait.For(t, patience, "no routes", func() bool { return len(guards(nl)) == 0 })
	})
	l, err := nl.LinkByName("vpc0")
	if err != nil {
		t.Fatal(err)
	}
	t.Run("MTU", func(t *testing.T) {
		if err := nl.LinkSetMTU(l, 1400); err != nil {
			t.Fatal(err)
		}
		testwait.NoError(t, patience, func() error {
			d, err := g.client.Doctor(ctx, control.DiagnosisRequest{})
			for _, l := range d.Links {
				if l.Name == "mtu" && strings.Contains(l.Detail, "1400") {
					return nil
				}
			}
			return fmt.Errorf("%+v, %v", d.Links, err)
		})
	})
	t.Run("down and up", func(t *testing.T) {
		if err := nl.LinkSetDown(l); err != nil {
			t.Fatal(err)
		}
		testwait.NoError(t, patience, func() error {
			code, h := readiness(t, cfg)
			if code == http.StatusOK || !slices.Contains(failedChecks(h), "interface_vpc0") {
				return fmt.Errorf("%d, %q", code, failedChecks(h))
			}
			return nil
		})
		if x := explain("172.31.0.10:0", "10.0.0.10:443"); x.Reason != "host_interface_down" {
			t.Errorf("%+v", x)
		}
		if err := nl.LinkSetUp(l); err != nil {
			t.Fatal(err)
		}
		testwait.NoError(t, patience, func() error { return client.connect("10.0.0.10:443") })
		testwait.For(t, patience, "readiness", func() bool { code, _ := readiness(t, cfg); return code == http.StatusOK })
	})
}

// An interface that is gone ends the gateway, so that it is started again.
func TestPacketInterfaceGone(t *testing.T) { inNamespace(t, testPacketInterfaceGone) }

func testPacketInterfaceGone(t *testing.T, nl *netlink.Handle) {
	sysctl(t, "ipv4/ip_forward", "0")
	newVPCClient(t, nl)
	dir := shortDir(t)
	cfg := load(t, map[string][]string{"home": {dir}, "socket": {dir + "/s"}, "listen": {""}, "ingress": {"packet"}, "interface": {"vpc0"}, "source": {"172.31.0.0/16"}})
	g := startGateway(t, cfg, gatewaytest.NewNode())
	l, err := nl.LinkByName("vpc0")
	if err != nil {
		t.Fatal(err)
	}
	if err := nl.LinkDel(l); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-g.done:
		if err == nil || !strings.Contains(err.Error(), `interface "vpc0" is gone`) {
			t.Errorf("run: %v", err)
		}
	case <-time.After(2 * patience):
		t.Fatal("it goes on")
	}
}

// Without one interface, or where the kernel forwards, auto means a TUN.
func TestAutoIngress(t *testing.T) { inNamespace(t, testAutoIngress) }

func testAutoIngress(t *testing.T, nl *netlink.Handle) {
	newVPCClient(t, nl)
	for _, tt := range []struct {
		forward, iface, kind, says string
	}{{"1", "vpc0", config.IngressTUN, "the kernel forwards packets that come by vpc0"}, {"0", "lo", config.IngressTUN, "it isn't an Ethernet interface"},
		{"0", "vpc0", config.IngressPacket, "packet sockets work there"}} {
		sysctl(t, "ipv4/ip_forward", tt.forward)
		dir := shortDir(t)
		cfg := load(t, map[string][]string{"home": {dir}, "socket": {dir + "/s"}, "listen": {""}, "ingress": {"auto"}, "interface": {tt.iface}, "tun": {"ztgt7"}, "source": {"172.31.0.0/16"}})
		g := startGateway(t, cfg, gatewaytest.NewNode())
		st, err := g.client.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if st.Ingress.Kind != tt.kind || !strings.Contains(st.Ingress.From, tt.says) {
			t.Errorf("%+v: %+v", tt, st.Ingress)
		}
		if r, err := g.client.Reload(t.Context()); err != nil || len(r.Changed)+len(r.Restart) > 0 {
			t.Errorf("reload of the same: %+v, %v", r, err)
		}
		g.end(t)
	}
}
