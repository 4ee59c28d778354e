//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"ztgate/internal/testwait"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/router/lab"
)

const translated = `
nat: {max_flows_per_client: 40}
forwards:
  - {listen: "tcp/8443", to: "10.0.0.10:443"}
  - {listen: "tcp/172.31.0.1:8445", to: "10.0.0.10:443"}       # this host's own address
  - {listen: "tcp/192.168.50.5:443", to: "10.0.0.10:443"}      # which the VPC routes to this host
  - {listen: "tcp/10.0.0.1:8447", to: "10.0.0.10:443"}         # this host's on the overlay
  - {listen: "tcp/8446", to: "db.office.test:443"}             # a name
  - {listen: "tcp/2300", to: "172.31.0.10:2300"}               # VPC clients to a VPC host
  - {listen: "tcp/10.0.0.1:2301", to: "172.31.0.10:2301"}
  - {listen: "tcp/2302", to: "172.31.0.10:2302", from: overlay}
  - {listen: "tcp/10.0.0.1:2303", to: "172.31.0.10:2303", from: overlay}
targets: ["tcp://db.office.test:443"]
`

// hosts is a hosts file that says where the office's database is.
func hosts(database string) string { return "127.0.0.1 localhost\n" + database + " db.office.test\n" }

// One gateway that forwards in every way, and what it says of it.
func TestTranslation(t *testing.T) {
	t.Parallel()
	o := options(t)
	o.Prefix += "fwd"
	testTranslation(t, o)
}

func testTranslation(t *testing.T, o lab.Options) {
	o.Config, o.Targets = translated, []string{}
	o.Prepare = func(s *lab.Scenario) error {
		return errors.Join(s.Gateway.Etc("hosts", hosts(office)),
			s.VPC.AddRoute(netip.MustParsePrefix("192.168.50.5/32"), netip.MustParseAddr("172.31.0.1")),
			s.VPC.AddAddress("eth0", netip.MustParsePrefix(greedy+"/24")))
	}
	s := start(t, o)
	for _, port := range []string{"2300", "2301", "2302", "2303"} {
		echoLines(t, s.VPC, vpcClient+":"+port)
	}
	t.Run("served", func(t *testing.T) {
		if st := statusOf(t, s); len(st.Problems) > 0 || len(st.Networks[0].Problems) > 0 {
			t.Errorf("problems: %q, %q", st.Problems, st.Networks[0].Problems)
		}
		for _, at := range []string{"172.31.0.1:8443", "10.0.0.1:8443", "172.31.0.1:8445", "192.168.50.5:443", "10.0.0.1:8447", "172.31.0.1:8446", "10.0.0.1:8446"} {
			if err := reading(s.VPC, at); err != nil {
				t.Errorf("%s: %v", at, err)
			}
		}
	})
	t.Run("sides", func(t *testing.T) {
		var tries sync.WaitGroup // most of them last until they time out
		try := func(from *lab.Namespace, at string, ok bool) {
			tries.Go(func() {
				if who, err := talk(from, at); (err == nil) != ok {
					t.Errorf("%s to %s: %q, %v", from.Name, at, who, err)
				}
			})
		}
		for _, port := range []string{"2300", "2301"} {
			try(s.VPC, "10.0.0.1:"+port, true)
			try(s.Office, "10.0.0.1:"+port, false)
		}
		for _, port := range []string{"2302", "2303"} {
			try(s.VPC, "10.0.0.1:"+port, false)
			try(s.VPC, "172.31.0.1:"+port, false)
			try(s.Office, "10.0.0.1:"+port, true)
		}
		tries.Wait()
		if err := reading(s.Office, "10.0.0.1:8443"); err == nil {
			t.Error("the overlay reaches a forward of the VPC's")
		}
	})
	t.Run("refused", func(t *testing.T) { testRefusedConfig(t, s) })
	t.Run("names", func(t *testing.T) { testNames(t, s) })
	t.Run("explain", func(t *testing.T) { testExplain(t, s, o.Ingress == config.IngressPacket) })
}

// testRefusedConfig: what can't work is refused with the reason, and a reload of it
// changes nothing.
func testRefusedConfig(t *testing.T, s *lab.Scenario) {
	for _, c := range []struct{ name, text, says string }{
		{"metadata service", `forwards: [{listen: "tcp/8443", to: "169.254.169.254:80"}]`, "169.254.0.0/16"},
		{"loopback", `forwards: [{listen: "tcp/8443", to: "127.0.0.1:80"}]`, "127.0.0.0/8"},
		{"listen on loopback", `forwards: [{listen: "tcp/127.0.0.1:8443", to: "10.0.0.10:80"}]`, "127.0.0.0/8"},
		{"overlay to overlay", `forwards: [{listen: "tcp/10.0.0.1:8080", to: "10.0.0.10:80", from: overlay}]`, "only forwarded into the VPC"},
		{"outside the sources", `forwards: [{listen: "tcp/8080", to: "192.168.7.7:80", from: overlay}]`, "192.168.7.7 is outside vpc.sources"},
		{"unmasked to the overlay", `forwards: [{listen: "tcp/8080", to: "10.0.0.10:80", masquerade: false}]`, "can't see clients' addresses"},
		{"twice", `forwards: [{listen: "tcp/8080", to: "10.0.0.10:80"}, {listen: "tcp/8080", to: "10.0.0.11:80"}]`, "another one listens there"},
		{"default route", fmt.Sprintf(`networks: [{id: "%s", allow_default: true}]`, s.Network), "takes no default route"},
	} {
		t.Run(c.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "ztgate.yaml")
			if err := os.WriteFile(file, []byte("vpc: {sources: [172.31.0.0/16]}\n"+c.text+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := command(t, "config", "check", file).CombinedOutput()
			exit, _ := errors.AsType[*exec.ExitError](err)
			if exit == nil || exit.ExitCode() != 2 || !strings.Contains(string(out), c.says) {
				t.Errorf("config check: %v, want exit code 2 and %q in %q", err, c.says, out)
			}
			if err := s.WriteConfig(c.text + "\npolicy: {default: drop}\n"); err != nil {
				t.Fatal(err)
			}
			if _, err := s.GatewayAPI.Reload(t.Context()); fault.ExitCode(err) != 2 || !strings.Contains(err.Error(), c.says) {
				t.Errorf("reload: %v", err)
			}
			if err := reading(s.VPC, "172.31.0.1:8445"); err != nil {
				t.Errorf("the running configuration isn't in force: %v", err)
			}
		})
	}
	if err := s.WriteConfig(translated); err != nil {
		t.Fatal(err)
	}
	if r, err := s.GatewayAPI.Reload(t.Context()); err != nil || len(r.Changed)+len(r.Restart) > 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

// testNames: a target and a forward follow their name.
func testNames(t *testing.T, s *lab.Scenario) {
	known := func(address string) error {
		st := statusOf(t, s)
		if len(st.Names) != 1 || st.Names[0].Name != "db.office.test" || len(st.Names[0].Addresses) != 1 || st.Names[0].Addresses[0].String() != address {
			return fmt.Errorf("names %+v, want %s", st.Names, address)
		}
		return nil
	}
	if err := known(office); err != nil {
		t.Error(err)
	}
	if st := statusOf(t, s); len(st.Targets) != 1 || !st.Targets[0].Up || st.Targets[0].Target != "tcp://db.office.test:443" {
		t.Errorf("targets %+v", st.Targets)
	}
	move := func(address string) {
		if err := s.Gateway.Etc("hosts", hosts(address)); err != nil {
			t.Fatal(err)
		}
		// The file is read again at the next look after some seconds; a reload looks.
		testwait.NoError(t, soon, func() error {
			if _, err := s.GatewayAPI.Reload(t.Context()); err != nil {
				return err
			}
			return known(address)
		})
	}
	move("10.0.0.99")
	if err := reading(s.VPC, "172.31.0.1:8446"); err == nil {
		t.Error("the forward still leads to the old address")
	}
	testwait.NoError(t, soon, func() error {
		if st := statusOf(t, s); st.Targets[0].Up || st.Health.Ready {
			return fmt.Errorf("the target is probed at the old address: %+v", st.Targets)
		}
		return nil
	})
	move(office)
	testwait.NoError(t, soon, func() error {
		if st := statusOf(t, s); !st.Health.Ready {
			return fmt.Errorf("%+v", st.Health)
		}
		return errors.Join(reading(s.VPC, "172.31.0.1:8446"), reading(s.VPC, "10.0.0.1:8446"))
	})
}

// The VPC and the overlay have the same range, and each a host at the same address.
func TestOverlap(t *testing.T) {
	t.Parallel()
	o := options(t)
	o.Prefix += "same"
	o.Sources = []string{"172.31.0.0/16", "10.0.0.0/24"}
	o.Targets = []string{"tcp://10.77.0.10:443"}
	o.Config = "maps: [{hosts: overlay, real: 10.0.0.0/24, alias: 10.77.0.0/24}]\n"
	var other *lab.Namespace // a VPC host in another subnet
	o.Prepare = func(s *lab.Scenario) (err error) {
		if other, err = s.Namespace("other"); err != nil {
			return err
		}
		gw := netip.MustParseAddr("172.31.0.1")
		if _, err := s.VPC.Run(s.Context(), "ip", "route", "del", "10.0.0.0/24"); err != nil {
			return err
		}
		return errors.Join(lab.Connect(s.Gateway, "eth-other", other, "eth0"),
			s.Gateway.AddAddress("eth-vpc", netip.MustParsePrefix("10.0.0.2/24")),
			s.VPC.AddAddress("eth0", netip.MustParsePrefix(office+"/24")),
			s.Gateway.AddAddress("eth-other", netip.MustParsePrefix("172.31.5.1/24")),
			other.AddAddress("eth0", netip.MustParsePrefix("172.31.5.10/24")),
			other.AddRoute(netip.MustParsePrefix("10.0.0.0/8"), netip.MustParseAddr("172.31.5.1")),
			s.VPC.AddRoute(netip.MustParsePrefix("172.31.5.0/24"), gw),
			s.VPC.AddRoute(netip.MustParsePrefix("10.77.0.0/24"), gw))
	}
	s := start(t, o)
	l, err := s.VPC.Listen("tcp", office+":80")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		_ = http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			host, _, _ := net.SplitHostPort(r.RemoteAddr)
			fmt.Fprintf(w, "VPC server, you are %s\n", host)
		}))
	}()
	page := func(n *lab.Namespace, host string) string {
		return run(t, n, "curl", "-sSk", "--max-time", "5", "http://"+host+"/")
	}
	for _, n := range []*lab.Namespace{s.VPC, other} {
		if out := page(n, "10.77.0.10"); !strings.Contains(out, "Office server") || !strings.Contains(out, "10.0.0.1.") {
			t.Errorf("%s at the alias: %s", n.Name, out)
		}
		if err := errors.Join(reading(n, "10.77.0.10"), pings(n, "10.77.0.10")); err != nil {
			t.Errorf("%s: %v", n.Name, err)
		}
	}
	if out := page(other, office); !strings.Contains(out, "VPC server, you are 172.31.5.10") {
		t.Errorf("a VPC host at the VPC's address: %s", out)
	}
	if out := page(s.Gateway, office); !strings.Contains(out, "VPC server, you are 10.0.0.2") {
		t.Errorf("the gateway's host at the VPC's address: %s", out)
	}
	if out := run(t, s.Gateway, "ip", "route", "show"); !strings.Contains(out, "10.77.0.0/24 dev ztg0") || !strings.Contains(out, "10.0.0.0/24 dev eth-vpc") || strings.Contains(out, "10.0.0.0/24 dev ztg0") {
		t.Errorf("routes:\n%s", out)
	}
	for _, target := range []string{"10.77.0.10", "10.77.0.10:443"} {
		if out := string(ask(t, s, "ping", "-c", "1", target)); !strings.Contains(out, "answer from "+target) {
			t.Errorf("ztgate ping %s: %s", target, out)
		}
	}
	st := statusOf(t, s)
	if !st.Health.Ready || len(st.Problems)+len(st.Networks[0].Problems) > 0 || !st.Targets[0].Up {
		t.Errorf("health %+v, problems %q, %q", st.Health, st.Problems, st.Networks[0].Problems)
	}
	for _, c := range []struct{ from, to, verdict string }{
		{"172.31.0.10", "10.77.0.10:443", "forward"}, {office, "10.77.0.10:443", "forward"}, {"172.31.5.10", office + ":80", "elsewhere"},
	} {
		x, err := s.GatewayAPI.Explain(context.Background(), control.Question{Source: netip.AddrPortFrom(netip.MustParseAddr(c.from), 0), Destination: netip.MustParseAddrPort(c.to)})
		if err != nil || x.Verdict != c.verdict {
			t.Errorf("%s to %s: %+v, %v", c.from, c.to, x, err)
			continue
		}
		if c.verdict == "forward" && (x.Destination.String() != office+":443" || x.Member != s.OfficeAddr || !x.Redirected) {
			t.Errorf("%s to %s: %+v", c.from, c.to, x)
		}
	}
}
