//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
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

// exitNAT is a home router's: nothing comes in unasked, and only who was asked, at the port that
// was asked, may answer.
const exitNAT = `table inet filter {
	chain forward {
		type filter hook forward priority 0; policy drop;
		ct state established,related accept
		iifname "lan" accept
	}
	chain postrouting {
		type nat hook postrouting priority 100;
		meta nfproto ipv4 oifname "wan" masquerade
	}
}
`

// handMadeExit is what an exit made by hand has.
const handMadeExit = `table inet nat {
	chain postrouting {
		type nat hook postrouting priority 100;
		oifname "eth0" masquerade
	}
}
`

// Addresses of the internet of these tests: public ones, since private ones are no
// internet for an exit.
const (
	exitRoot  = "44.128.0.1"
	exitGW    = "44.128.0.10"
	exitNAT4  = "44.128.0.11" // of the gateway, not of its kernel
	exitNAT6  = "2600:1::11"
	exitHome  = "44.128.0.30" // of the router
	exitFar   = "44.129.0.1"  // a router of the internet towards
	exitWeb   = "44.129.0.80" // a web server
	exitGW6   = "2600:1::10"
	exitHome6 = "2600:5::7" // of the home server
	exitWeb6  = "2600:2::80"

	exitOverlay  = "10.77.0.1"
	exitOverlay6 = "fd77::1"
	homeOverlay  = "10.77.0.7"
	homeOverlay6 = "fd77::7"
)

// exitLab is an internet with a web server behind a router, a gateway, and a home server behind a NAT.
type exitLab struct {
	*lab.Topology
	inet, root, far, web, gw, router, home *lab.Namespace
	controller                             *control.Client
	planet                                 string
	network                                ztnode.NetworkID
	address                                map[string]string // of nodes

	homeProcess, gwProcess *lab.Process
	homeAPI, gwAPI         *control.Client
}

func (l *exitLab) must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// startExitLab makes the namespaces, the root and the network. v6 says that there is a
// default route for IPv6 too.
func startExitLab(t *testing.T, name string, v6 bool) *exitLab {
	t.Helper()
	top, err := lab.New(context.Background(), options(t).Prefix+name)
	if err != nil {
		t.Fatal(err)
	}
	l := &exitLab{Topology: top, address: map[string]string{}}
	labtest.End(t, l.Topology)
	for n, to := range map[string]**lab.Namespace{"inet": &l.inet, "root": &l.root, "far": &l.far, "web": &l.web, "gw": &l.gw, "router": &l.router, "home": &l.home} {
		*to, err = l.Namespace(n)
		l.must(t, err)
	}
	l.must(t, l.inet.Bridge("br0"))
	address := func(n *lab.Namespace, ifname string, list ...string) {
		t.Helper()
		for _, p := range list {
			l.must(t, n.AddAddress(ifname, netip.MustParsePrefix(p)))
		}
	}
	route := func(n *lab.Namespace, target, via string) {
		t.Helper()
		l.must(t, n.AddRoute(netip.MustParsePrefix(target), netip.MustParseAddr(via)))
	}
	for _, h := range []struct {
		n            *lab.Namespace
		ifname, port string
		addrs        []string
	}{
		{l.root, "eth0", "root", []string{exitRoot + "/24", "2600:1::1/64"}}, {l.gw, "eth0", "gw", []string{exitGW + "/24", exitGW6 + "/64"}},
		{l.router, "wan", "router", []string{exitHome + "/24", "2600:1::30/64"}}, {l.far, "eth0", "far", []string{"44.128.0.254/24", "2600:1::fe/64"}},
	} {
		l.must(t, lab.Plug(h.n, h.ifname, l.inet, "br0", h.port))
		address(h.n, h.ifname, h.addrs...)
	}
	l.must(t, lab.Connect(l.far, "eth1", l.web, "eth0"))
	address(l.far, "eth1", exitFar+"/24", "2600:2::1/64")
	address(l.web, "eth0", exitWeb+"/24", exitWeb6+"/64")
	l.must(t, lab.Connect(l.router, "lan", l.home, "eth0"))
	address(l.router, "lan", "192.168.5.1/24", "2600:5::1/64")
	address(l.home, "eth0", "192.168.5.7/24", exitHome6+"/64")
	for _, n := range []*lab.Namespace{l.far, l.router, l.gw} {
		l.must(t, n.Sysctl("net/ipv4/ip_forward", "1"))
		l.must(t, n.Sysctl("net/ipv6/conf/all/forwarding", "1"))
	}
	for _, n := range []*lab.Namespace{l.root, l.gw, l.router} {
		route(n, "0.0.0.0/0", "44.128.0.254")
		route(n, "::/0", "2600:1::fe")
	}
	route(l.web, "0.0.0.0/0", exitFar)
	route(l.web, "::/0", "2600:2::1")
	route(l.home, "0.0.0.0/0", "192.168.5.1")
	route(l.home, "::/0", "2600:5::1")
	route(l.far, "2600:5::/64", "2600:1::30")
	if out, err := l.router.Input(l.Context(), exitNAT, "nft", "-f", "-"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	l.credentials(t)
	_, l.controller = l.ours(t, l.root, "root", "member", "--controller")
	l.makeNetwork(t, v6)
	l.startWeb(t)
	return l
}

func (l *exitLab) credentials(t *testing.T) {
	t.Helper()
	for _, name := range []string{"root", "gw", "home"} {
		home, err := l.Home(name)
		l.must(t, err)
		id, err := admin.NewIdentity(filepath.Join(home, "identity.secret"), filepath.Join(home, "identity.public"), false)
		l.must(t, err)
		l.address[name] = id.Address
	}
	l.planet = filepath.Join(l.Dir, "planet")
	_, err := admin.WritePlanet(admin.PlanetSpec{
		Roots: []string{fmt.Sprintf("%s=%s/9993", filepath.Join(l.Dir, "root", "identity.public"), exitRoot)}, Now: time.Now(),
	}, l.planet, filepath.Join(l.Dir, "planet.key"), false)
	l.must(t, err)
}

// ours starts one of our processes.
func (l *exitLab) ours(t *testing.T, n *lab.Namespace, name string, args ...string) (*lab.Process, *control.Client) {
	t.Helper()
	socket := filepath.Join(l.Dir, name, "ztgate.sock")
	p, err := l.Start(n, name, options(t).Binary, append(args, "--listen", "", "--planet", l.planet, "--socket", socket)...)
	l.must(t, err)
	c := control.NewClient(socket)
	testwait.NoError(t, 30*time.Second, func() error { _, err := c.Info(context.Background()); return err })
	return p, c
}

// makeNetwork makes the network as an operator does, by the command line.
func (l *exitLab) makeNetwork(t *testing.T, v6 bool) {
	t.Helper()
	args := []string{"controller", "create", "--name", "exit", "--subnet", "10.77.0.0/24", "--route", "fd77::/64", "--route", "0.0.0.0/0=" + exitOverlay}
	if v6 {
		args = append(args, "--route", "::/0="+exitOverlay6)
	}
	l.must(t, l.network.UnmarshalText(bytes.TrimSpace([]byte(l.control(t, "root", args...)))))
	l.control(t, "root", "controller", "authorize", l.network.String(), l.address["gw"], "--ip", exitOverlay, "--ip", exitOverlay6)
	l.control(t, "root", "controller", "authorize", l.network.String(), l.address["home"], "--ip", homeOverlay, "--ip", homeOverlay6)
}

// control runs a command at the socket of a process.
func (l *exitLab) control(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := command(t, append(args, "--socket", filepath.Join(l.Dir, name, "ztgate.sock"))...).CombinedOutput()
	if err != nil {
		t.Fatalf("ztgate %v: %v: %s", args, err, out)
	}
	return string(out)
}

// startWeb starts a server that tells each client its address.
func (l *exitLab) startWeb(t *testing.T) {
	t.Helper()
	for _, a := range []string{exitWeb, exitWeb6} {
		whoAsks(t, l.web, netip.AddrPortFrom(netip.MustParseAddr(a), 80))
	}
}

// seenAs fetches a page and returns as whom the server sees the home server.
func (l *exitLab) seenAs(v6 bool) (string, error) {
	a := exitWeb
	if v6 {
		a = exitWeb6
	}
	return asked(l.home, netip.AddrPortFrom(netip.MustParseAddr(a), 80))
}

func (l *exitLab) awaitSeen(t *testing.T, v6 bool, as string) {
	t.Helper()
	testwait.NoError(t, 60*time.Second, func() error {
		got, err := l.seenAs(v6)
		if err == nil && got != as {
			err = fmt.Errorf("seen as %s, want %s", got, as)
		}
		return err
	})
}

// routing is all that decides where packets of the home server go.
func (l *exitLab) routing(t *testing.T) string {
	t.Helper()
	return run(t, l.home, "ip", "rule") + run(t, l.home, "ip", "-6", "rule") +
		run(t, l.home, "ip", "route", "show", "table", "all") + run(t, l.home, "ip", "-6", "route", "show", "table", "all")
}

// startHandMade makes an exit of the gateway's host by hand.
func (l *exitLab) startHandMade(t *testing.T) {
	t.Helper()
	if out, err := l.gw.Input(l.Context(), handMadeExit, "nft", "-f", "-"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	l.gwProcess, l.gwAPI = l.ours(t, l.gw, "gw", "member", "--network", l.network.String(), "--tun", "ztm0")
}

// startGateway starts a gateway that is the exit.
func (l *exitLab) startGateway(t *testing.T, more ...string) {
	t.Helper()
	args := []string{"run", "--network", l.network.String(), "--tun", "ztg0", "--source", "172.31.0.0/16", "--interface", "eth0", "--exit", "--config", ""}
	l.gwProcess, l.gwAPI = l.ours(t, l.gw, "gw", append(args, more...)...)
}

// startHome starts a member that allows the default route.
func (l *exitLab) startHome(t *testing.T) {
	t.Helper()
	file := filepath.Join(l.Dir, "home", "ztgate.yaml")
	l.must(t, os.WriteFile(file, fmt.Appendf(nil, "networks: [{id: %q, allow_default: true}]\n", l.network), 0o600))
	l.homeProcess, l.homeAPI = l.ours(t, l.home, "home", "member", "--config", file, "--tun", "ztm0")
}

// startRealHome starts a zerotier-one that allows it.
func (l *exitLab) startRealHome(t *testing.T, binary string) {
	t.Helper()
	home := filepath.Join(l.Dir, "home")
	planet, err := os.ReadFile(l.planet)
	l.must(t, err)
	l.must(t, os.MkdirAll(filepath.Join(home, "networks.d"), 0o700))
	for file, text := range map[string]string{
		"planet": string(planet), "local.conf": `{"settings":{"portMappingEnabled":false,"softwareUpdate":"disable"}}`,
		"networks.d/" + l.network.String() + ".conf":       "",
		"networks.d/" + l.network.String() + ".local.conf": "allowManaged=1\nallowGlobal=1\nallowDefault=1\nallowDNS=0\n",
	} {
		l.must(t, os.WriteFile(filepath.Join(home, file), []byte(text), 0o600))
	}
	l.homeProcess, err = l.StartPlain(l.home, "home", binary, "-U", "-p9993", home)
	l.must(t, err)
}

// health returns the reason of a check, "" if it passes.
func health(c *control.Client, check string) (string, error) {
	h, err := c.Health(context.Background())
	if err != nil {
		return "", err
	}
	for _, x := range h.Checks {
		if x.Name == check && !x.OK {
			return x.Reason, nil
		}
	}
	return "", nil
}

// A home server behind a NAT sends all its traffic out through an exit, and only when that
// works; the overlay itself, its own subnet and answers to others keep their way.
func TestExitMember(t *testing.T) {
	l := startExitLab(t, "exitm", true)
	before := l.routing(t)
	l.startHome(t)

	// There is an exit in the network, but nobody there yet: nothing is cut off.
	testwait.NoError(t, 30*time.Second, func() error {
		why, err := health(l.homeAPI, "exit")
		if err == nil && !strings.Contains(why, "doesn't take it yet") {
			err = fmt.Errorf("health: %q", why)
		}
		return err
	})
	l.awaitSeen(t, false, exitHome)
	l.awaitSeen(t, true, exitHome6)

	l.startHandMade(t)
	testwait.NoError(t, 60*time.Second, func() error {
		h, err := l.homeAPI.Health(context.Background())
		if err == nil {
			err = h.Err()
		}
		return err
	})
	l.awaitSeen(t, false, exitGW)
	l.awaitSeen(t, true, exitGW6)
	l.witnesses(t)
	if out := l.control(t, "home", "status"); !strings.Contains(out, "default route: by "+exitOverlay+" in network "+l.network.String()+", in force\n") {
		t.Errorf("status: %s", out)
	}

	t.Run("own ways", func(t *testing.T) {
		run(t, l.home, "ping", "-n", "-c", "1", "-W", "2", "192.168.5.1")
		// Who came to the host's own address is answered by the way he came.
		echoOn(t, l.home, netip.MustParseAddrPort("["+exitHome6+"]:7007"))
		if out, err := l.router.Input(l.Context(), "insert rule inet filter forward ip6 daddr "+exitHome6+" accept", "nft", "-f", "-"); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		c, err := l.web.Dial(ctx, "tcp", "["+exitHome6+"]:7007")
		if err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
		// Strict filters of the host don't take the overlay its answers.
		for _, name := range []string{"all", "eth0"} {
			l.must(t, l.home.Sysctl("net/ipv4/conf/"+name+"/rp_filter", "1"))
		}
		for range 3 {
			l.awaitSeen(t, false, exitGW)
		}
		peers, err := l.homeAPI.Peers(context.Background())
		if err != nil || !bytes.Contains(mustJSON(t, peers), []byte(exitGW)) {
			t.Errorf("no direct path to the exit: %s, %v", mustJSON(t, peers), err)
		}
	})

	t.Run("exit killed", func(t *testing.T) {
		l.gwProcess.Kill()
		testwait.NoError(t, 30*time.Second, func() error {
			why, err := health(l.homeAPI, "exit")
			if err == nil && !strings.Contains(why, "goes nowhere") {
				err = fmt.Errorf("health: %q", why)
			}
			return err
		})
		for _, v6 := range []bool{false, true} {
			if as, err := l.seenAs(v6); err == nil {
				t.Errorf("past the exit, seen as %s", as)
			}
		}
		l.startHandMade(t)
		l.awaitSeen(t, false, exitGW)
		l.awaitSeen(t, true, exitGW6)
	})

	t.Run("killed", func(t *testing.T) {
		l.homeProcess.Kill()
		l.awaitSeen(t, false, exitHome)
		l.awaitSeen(t, true, exitHome6)
		l.startHome(t)
		l.awaitSeen(t, false, exitGW)
		l.awaitSeen(t, true, exitGW6)
	})

	t.Run("leave", func(t *testing.T) {
		// De-authorised, it has no exit.
		l.control(t, "root", "controller", "deauthorize", l.network.String(), l.address["home"])
		l.awaitSeen(t, false, exitHome)
		l.control(t, "root", "controller", "authorize", l.network.String(), l.address["home"], "--ip", homeOverlay, "--ip", homeOverlay6)
		l.awaitSeen(t, false, exitGW)
	})

	t.Run("IPv4 alone", func(t *testing.T) {
		l.control(t, "root", "controller", "set", l.network.String(), "--subnet", "10.77.0.0/24", "--route", "fd77::/64", "--route", "0.0.0.0/0="+exitOverlay)
		testwait.NoError(t, 30*time.Second, func() error {
			if out := run(t, l.home, "ip", "-6", "route", "show", "table", "31348"); !strings.Contains(out, "unreachable ::/1") {
				return fmt.Errorf("IPv6 isn't blocked: %s", out)
			}
			return nil
		})
		for range 5 {
			began := time.Now()
			if as, err := l.seenAs(true); err == nil || time.Since(began) > 2*time.Second {
				t.Errorf("IPv6 leaks: seen as %s, or is told late: %v\n%s", as, err, l.routing(t))
			}
		}
		l.awaitSeen(t, false, exitGW)
	})

	t.Run("stop", func(t *testing.T) {
		l.homeProcess.Stop()
		l.awaitSeen(t, false, exitHome)
		l.awaitSeen(t, true, exitHome6)
		if after := l.routing(t); strip(after) != strip(before) {
			t.Errorf("before:\n%s\nafter:\n%s", before, after)
		}
	})
}

// strip leaves out what the kernel adds by itself.
func strip(routing string) string {
	var out []string
	for line := range strings.Lines(routing) {
		if !strings.Contains(line, "expires") && !strings.Contains(line, "fe80:") {
			out = append(out, strings.TrimSpace(line))
		}
	}
	return strings.Join(out, "\n")
}

// witnesses are programs that see that all goes through the exit.
func (l *exitLab) witnesses(t *testing.T) {
	t.Run("ping", func(t *testing.T) {
		for _, a := range []string{exitWeb, exitWeb6} {
			out := run(t, l.home, "ping", "-n", "-c", "3", "-i", "0.2", a)
			if !strings.Contains(out, " 0% packet loss") {
				t.Error(out)
			}
		}
	})
	t.Run("large", func(t *testing.T) {
		for _, a := range []string{exitWeb, exitWeb6} {
			run(t, l.home, "ping", "-n", "-c", "5", "-i", "0.2", "-W", "2", "-s", "3000", a) // fragments, in IPv6 after the first
			url := "http://" + netip.AddrPortFrom(netip.MustParseAddr(a), 80).String() + "/"
			run(t, l.home, "sh", "-c", fmt.Sprintf("head -c %d /dev/zero | curl -sS --max-time 20 -T - %s", large, url))
			if out := run(t, l.home, "sh", "-c", "curl -sS --max-time 20 "+url+"large | wc -c"); strings.TrimSpace(out) != fmt.Sprint(large) {
				t.Errorf("%s: %s bytes come", a, out)
			}
		}
	})
	t.Run("traceroute", func(t *testing.T) {
		for _, c := range []struct {
			args []string
			hops []string
		}{
			{[]string{"-4", exitWeb}, []string{exitOverlay, exitWeb, "44.128.0.254"}},
			{[]string{"-6", exitWeb6}, []string{exitOverlay6, exitWeb6, "2600:1::fe"}},
		} {
			for _, kind := range []string{"-U", "-I", "-T"} {
				out := run(t, l.home, "traceroute", append([]string{"-n", "-q", "1", "-w", "2", "-m", "8", kind}, c.args...)...)
				lines := strings.Split(strings.TrimSpace(out), "\n")
				if len(lines) < 3 || !strings.Contains(lines[1], c.hops[0]+" ") || !strings.Contains(lines[len(lines)-1], c.hops[1]+" ") {
					t.Errorf("traceroute %s: want the exit first and the server last:\n%s", kind, out)
				}
				if kind == "-I" && !strings.Contains(out, c.hops[2]+" ") {
					t.Errorf("traceroute: the router between isn't shown:\n%s", out)
				}
			}
		}
	})
}

func mustJSON(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A gateway is the exit of a home server, ours or a real zerotier-one: behind addresses of
// its own, or as its host.
func TestExit(t *testing.T) { testExit(t, "exit", (*exitLab).startHome, behindAddress) }

func TestExitHost(t *testing.T) { testExit(t, "exith", (*exitLab).startHome, asHost) }

func TestExitPacket(t *testing.T) {
	testExit(t, "exitp", (*exitLab).startHome, exitOf{args: append([]string{"--ingress", "packet"}, behindAddress.args...), as4: exitNAT4, as6: exitNAT6, forwards: "0"})
}

func TestInteropExit(t *testing.T) {
	binary := reference(t)
	testExit(t, "exitr", func(l *exitLab, t *testing.T) { l.startRealHome(t, binary) }, behindAddress)
}

// exitOf is how a gateway is an exit.
type exitOf struct {
	args     []string
	as4, as6 string // as whom the internet sees the home server
	forwards string // whether its kernel does, "" = yes
}

var (
	behindAddress = exitOf{args: []string{"--nat-address", exitNAT4, "--nat-address", exitNAT6}, as4: exitNAT4, as6: exitNAT6}
	asHost        = exitOf{as4: exitGW, as6: exitGW6}
)

func testExit(t *testing.T, name string, startHome func(*exitLab, *testing.T), how exitOf) {
	l := startExitLab(t, name, true)
	if how.forwards != "" {
		l.must(t, l.gw.Sysctl("net/ipv4/ip_forward", how.forwards))
		l.must(t, l.gw.Sysctl("net/ipv6/conf/all/forwarding", how.forwards))
	}
	before := run(t, l.gw, "ip", "rule") + run(t, l.gw, "ip", "route", "show", "table", "all")
	l.startGateway(t, how.args...)
	startHome(l, t)
	l.awaitSeen(t, false, how.as4)
	l.awaitSeen(t, true, how.as6)
	l.witnesses(t)
	t.Run("guards", func(t *testing.T) {
		// The gateway's own host, what is private, and metadata aren't the internet.
		for _, a := range []string{exitGW, "[" + exitGW6 + "]"} {
			at := netip.MustParseAddrPort(a + ":7009")
			echoOn(t, l.gw, at)
			c, err := l.web.Dial(t.Context(), "tcp", at.String()) // is there for others
			l.must(t, err)
			_ = c.Close()
		}
		for _, a := range []string{exitGW, "[" + exitGW6 + "]", "172.31.0.10", "192.168.5.1", "169.254.169.254"} {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			out, err := l.home.Run(ctx, "curl", "-sS", "--max-time", "1", "--interface", homeInterface(t, l), "http://"+a+":7009/")
			cancel()
			if err == nil {
				t.Errorf("%s is reached: %s", a, out)
			}
		}
	})
	t.Run("gateway's own way", func(t *testing.T) {
		run(t, l.gw, "ping", "-n", "-c", "1", "-W", "2", exitWeb)
		run(t, l.gw, "ping", "-n", "-c", "1", "-W", "2", exitWeb6)
		run(t, l.gw, "ip", "route", "del", "default")
		testwait.NoError(t, 20*time.Second, func() error {
			why, err := health(l.gwAPI, "exit")
			if err == nil && !strings.Contains(why, "no way to the internet") {
				err = fmt.Errorf("health: %q", why)
			}
			return err
		})
		run(t, l.gw, "ip", "route", "add", "default", "via", "44.128.0.254")
	})
	t.Run("gateway killed", func(t *testing.T) {
		l.gwProcess.Kill()
		run(t, l.gw, "ping", "-n", "-c", "1", "-W", "2", exitWeb)
		if as, err := l.seenAs(false); err == nil {
			t.Errorf("past the exit, seen as %s", as)
		}
		l.startGateway(t, how.args...)
		l.awaitSeen(t, false, how.as4)
		l.gwProcess.Stop()
		if after := run(t, l.gw, "ip", "rule") + run(t, l.gw, "ip", "route", "show", "table", "all"); strip(after) != strip(before) {
			t.Errorf("before:\n%s\nafter:\n%s", before, after)
		}
	})
}

// homeInterface is the home server's interface in the network.
func homeInterface(t *testing.T, l *exitLab) string {
	t.Helper()
	for line := range strings.Lines(run(t, l.home, "ip", "-o", "-4", "addr")) {
		if f := strings.Fields(line); strings.HasPrefix(f[3], homeOverlay+"/") {
			return f[1]
		}
	}
	t.Fatal("the home server has no address in the network")
	return ""
}
