//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
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
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/lab"
)

// dnsmasq runs a real name server in a namespace, on the address of the office.
func dnsmasq(t *testing.T, n *lab.Namespace, text string) (stop func()) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "dnsmasq.conf")
	text += "no-resolv\nno-hosts\nno-daemon\nuser=root\nbind-interfaces\nlisten-address=" + office + "\nport=53\ncache-size=0\nlocal-ttl=5\nedns-packet-max=1232\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	program, err := exec.LookPath("dnsmasq")
	if err != nil {
		program = "/usr/sbin/dnsmasq"
	}
	cmd := n.Command(context.Background(), program, "--conf-file="+path, "--pid-file=")
	var said strings.Builder
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := n.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	t.Cleanup(stop)
	testwait.NoError(t, 10*time.Second, func() error {
		_, err := n.Run(context.Background(), "dig", "+tries=1", "+time=1", "@"+office, "web.office.example", "+short")
		if err != nil {
			return fmt.Errorf("%w\n%s", err, said.String())
		}
		return nil
	})
	return stop
}

const officeNames = `
local=/office.example/
host-record=web.office.example,10.0.0.10
host-record=moved.office.example,10.0.0.10
cname=www.office.example,web.office.example
address=/bad.office.example/169.254.169.254
LARGEptr-record=77.0.0.10.in-addr.arpa,printer.office.example
`

// TestClientNames: programs of the VPC ask the gateway for names of the office, which a
// real name server there knows, and for names of members.
func TestClientNames(t *testing.T) {
	t.Run("tun", func(t *testing.T) { testClientNames(t, options(t), "172.31.0.1") })
	t.Run("packet", func(t *testing.T) { testClientNames(t, packetOptions(t, "pn"), "172.31.0.1:5300") }) // it has NET_RAW alone
}

func testClientNames(t *testing.T, o lab.Options, listen string) {
	o.Config = "policy: {default: accept}\n"
	s := start(t, o)
	ctx := t.Context()
	large := ""
	for i := range 8 {
		large += "txt-record=large.office.example," + strings.Repeat(string(rune('a'+i)), 200) + "\n"
	}
	names := strings.Replace(officeNames, "LARGE", large, 1)
	stop := dnsmasq(t, s.Office, names)
	if _, err := s.RootAPI.SetNetwork(ctx, s.Network.String(), map[string]any{"dns": map[string]any{"domain": "office.example", "servers": []string{office}}}); err != nil {
		t.Fatal(err)
	}
	base := "networks: [{id: \"" + s.Network.String() + "\", allow_dns: true}]\ndns:\n  listen: [\"" + listen + "\"]\n  hosts: [{name: db, network: \"" + s.Network.String() + "\", addresses: [" + office + ", \"fd00::10\"]}]\n"
	reload := func(text string) {
		t.Helper()
		if err := s.WriteConfig(text); err != nil {
			t.Fatal(err)
		}
		if _, err := s.GatewayAPI.Reload(ctx); err != nil {
			t.Fatal(err)
		}
	}
	reload(base)
	testwait.NoError(t, 30*time.Second, func() error {
		st, err := s.GatewayAPI.Status(ctx)
		if err == nil && (st.DNS == nil || len(st.DNS.Domains) != 1) {
			err = fmt.Errorf("%+v", st.DNS)
		}
		return err
	})
	host, port, ok := strings.Cut(listen, ":")
	if !ok {
		port = "53"
	}
	dig := func(t *testing.T, args ...string) string {
		t.Helper()
		return run(t, s.VPC, "dig", append([]string{"+tries=1", "+time=6", "-p", port, "@" + host}, args...)...)
	}
	short := func(t *testing.T, args ...string) string {
		t.Helper()
		return strings.Join(strings.Fields(dig(t, append(args, "+short")...)), " ")
	}
	zone := s.Network.String() + ".zt.internal"
	for _, tt := range []struct{ args, want string }{
		{"web.office.example", office},
		{"WEB.Office.example +tcp", office},
		{"www.office.example", "web.office.example. " + office},
		{"-x 10.0.0.77", "printer.office.example."},
		{"db." + zone, office},
		{"db." + zone + " AAAA", ""}, // the VPC has no way there
		{s.OfficeAddr + "." + zone, office},
		{s.GatewayMember + "." + zone + " +tcp", "10.0.0.1"},
		{"-x " + office, "db.lab.zt.internal."},
		{"zt.internal NS", "ns.zt.internal."},
		{"ns.zt.internal", host},
	} {
		if got := short(t, strings.Fields(tt.args)...); got != tt.want {
			t.Errorf("dig %s: %q, want %q", tt.args, got, tt.want)
		}
	}
	for _, tt := range []struct{ args, want string }{
		{"nobody.office.example", "status: NXDOMAIN"},
		{"web.office.example MX", "status: NOERROR"},
		{"nobody." + zone, "status: NXDOMAIN"},
		{"nobody." + zone, "SOA\tns.zt.internal. hostmaster.zt.internal."},
		{"db." + zone + " MX", "status: NOERROR"},
		{"example.com", "status: REFUSED"},
		{"web.office.example ANY +notcp", "status: REFUSED"},
		{"version.bind CH TXT", "status: REFUSED"},
		{"bad.office.example", "status: SERVFAIL"},
		{"large.office.example TXT +ignore", "flags: qr tc rd ra;"}, // by UDP
		{"large.office.example TXT", strings.Repeat("h", 200)},      // dig asks again by TCP
		{"large.office.example TXT", "(TCP)"},
		{"web.office.example +noedns +cookie", "ADDITIONAL: 0"},
	} {
		args := strings.Fields(tt.args)
		if strings.Contains(tt.args, "+noedns") {
			args = []string{"web.office.example", "+noedns"}
		}
		if got := dig(t, args...); !strings.Contains(got, tt.want) {
			t.Errorf("dig %s: %q isn't in\n%s", tt.args, tt.want, got)
		}
	}
	t.Run("nobody else", func(t *testing.T) {
		run(t, s.VPC, "ip", "address", "add", "192.0.2.77/32", "dev", "lo")
		run(t, s.Gateway, "ip", "route", "add", "192.0.2.77", "via", "172.31.0.10")
		for _, how := range []string{"+notcp", "+tcp"} {
			ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
			out, err := s.VPC.Run(ctx, "dig", "+tries=1", "+time=1", "-b", "192.0.2.77", "-p", port, "@"+host, how, "db."+zone)
			cancel()
			if err == nil {
				t.Errorf("%s: a host outside vpc.sources is answered:\n%s", how, out)
			}
		}
		m, err := s.Metrics(ctx)
		if n := m.Sum("ztgate_dns_queries_total", map[string]string{"result": "source"}); err != nil || n < 2 {
			t.Errorf("%v counted, %v", n, err)
		}
		if n := m.Sum("ztgate_dns_queries_total", map[string]string{"result": "forwarded"}); n < 5 {
			t.Errorf("%v forwarded", n)
		}
	})
	t.Run("commands", func(t *testing.T) {
		for args, list := range map[string][]string{
			"resolve web.office.example": {"web.office.example A: NOERROR, from network " + s.Network.String() + " (" + office + ":53)", office},
			"resolve 10.0.0.10":          {"10.0.0.10.in-addr.arpa. PTR: NOERROR, from zone zt.internal", "db.lab.zt.internal."},
			"status":                     {"names: answering at " + host + ":" + port, "office.example", office + ":53"},
		} {
			for _, want := range list {
				if out := string(ask(t, s, strings.Fields(args)...)); !strings.Contains(out, want) {
					t.Errorf("%s: %q isn't in\n%s", args, want, out)
				}
			}
		}
	})
	if o.Ingress == config.IngressPacket {
		return
	}
	t.Run("policy", func(t *testing.T) { testPolicyByName(t, s, base, reload, &stop, names) })
}

// testPolicyByName: a rule, a forward and a target follow a name, keep its last address
// when nobody answers, and accept nothing for one that has none.
func testPolicyByName(t *testing.T, s *lab.Scenario, base string, reload func(string), stop *func(), names string) {
	ctx := t.Context()
	name := "db." + s.Network.String() + ".zt.internal"
	https := func(want string) {
		t.Helper()
		testwait.NoError(t, 60*time.Second, func() error {
			x, err := s.GatewayAPI.Explain(ctx, control.Question{Source: netip.MustParseAddrPort("172.31.0.10:1000"), Destination: netip.MustParseAddrPort(office + ":443")})
			if err == nil && x.Verdict != want {
				err = fmt.Errorf("%s by %s, want %s", x.Verdict, x.RuleText, want)
			}
			return err
		})
	}
	reload(base + "policy: {allow: [\"tcp:nobody.office.example:443\"]}\n")
	https("drop")
	reload(base + "policy: {allow: [\"tcp:moved.office.example:443\"]}\n")
	https("forward")
	if err := fetch(s); err != nil {
		t.Error(err)
	}
	reload(base + "policy: {allow: [\"tcp:" + name + ":443\"]}\nforwards: [{listen: tcp/8443, to: \"" + name + ":443\"}]\n")
	https("forward")
	testwait.NoError(t, 20*time.Second, func() error {
		out, err := s.VPC.Run(ctx, "curl", "-sSk", "--max-time", "5", "https://172.31.0.1:8443/")
		if err == nil && !strings.Contains(string(out), "Office server") {
			err = errors.New(string(out))
		}
		return err
	})
	// The name moves, and the rule with it, as soon as its answer holds no longer.
	reload(base + "policy: {allow: [\"tcp:moved.office.example:443\"]}\n")
	https("forward")
	(*stop)()
	*stop = dnsmasq(t, s.Office, strings.Replace(names, "moved.office.example,10.0.0.10", "moved.office.example,10.0.0.99", 1))
	https("drop")
	(*stop)()
	*stop = dnsmasq(t, s.Office, names)
	https("forward")
	// Nobody answers: the last address stays, and health says so.
	(*stop)()
	for range 3 {
		_, _ = s.VPC.Run(ctx, "dig", "+tries=1", "+time=6", "@172.31.0.1", "web.office.example")
	}
	testwait.NoError(t, 150*time.Second, func() error {
		h, err := s.GatewayAPI.Health(ctx)
		if err != nil {
			return err
		}
		var failed []string
		for _, c := range h.Failed() {
			failed = append(failed, c.Name+": "+c.Reason)
		}
		text := strings.Join(failed, "\n")
		for _, want := range []string{"dns: no name server for office.example answers (10.0.0.10:53)", "names: the name moved.office.example hasn't been answered since"} {
			if !strings.Contains(text, want) {
				err = fmt.Errorf("%q isn't in\n%s", want, text)
			}
		}
		return err
	})
	https("forward")
	*stop = dnsmasq(t, s.Office, names)
	testwait.NoError(t, 60*time.Second, func() error {
		_, _ = s.VPC.Run(ctx, "dig", "+tries=1", "+time=6", "@172.31.0.1", "web.office.example")
		h, err := s.GatewayAPI.Health(ctx)
		if err == nil && slices.ContainsFunc(h.Failed(), func(c control.Check) bool { return c.Name == "dns" || c.Name == "names" }) {
			err = fmt.Errorf("%+v", h.Failed())
		}
		return err
	})
}

// TestMemberNames: where the gateway is the controller itself, names are those of its members,
// for clients and rules, as long as it lets them in.
func TestMemberNames(t *testing.T) {
	o := options(t)
	o.Prefix += "mn"
	o.Config = "controller: true\ndns: {listen: [172.31.0.1]}\npolicy: {allow: [\"tcp:10.0.0.10:443\", \"icmp:db.branch-office.zt.internal\"]}\n"
	s := start(t, o)
	ctx := t.Context()
	r, err := s.GatewayAPI.CreateNetwork(ctx, map[string]any{"name": "Branch Office", "private": true, "routes": []any{map[string]any{"target": "10.55.0.0/24"}}})
	if err != nil {
		t.Fatal(err)
	}
	var network struct{ ID string }
	if err := json.Unmarshal(r.Record, &network); err != nil {
		t.Fatal(err)
	}
	set := func(member string, patch map[string]any) {
		t.Helper()
		if _, err := s.GatewayAPI.SetMember(ctx, network.ID, member, patch); err != nil {
			t.Fatal(err)
		}
	}
	set(s.GatewayMember, map[string]any{"authorized": true, "ipAssignments": []string{"10.55.0.1"}})
	set(s.OfficeAddr, map[string]any{"authorized": true, "name": "DB", "ipAssignments": []string{"10.55.0.10"}})
	for _, api := range []*control.Client{s.GatewayAPI, s.OfficeAPI} {
		if _, err := api.Join(ctx, network.ID); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(what, want string, args ...string) {
		t.Helper()
		testwait.NoError(t, 60*time.Second, func() error {
			out, err := s.VPC.Run(ctx, args[0], args[1:]...)
			if !strings.Contains(string(out), want) {
				return fmt.Errorf("%s: %q isn't in %v\n%s", what, want, err, out)
			}
			return nil
		})
	}
	dig := []string{"dig", "+tries=1", "+time=2", "@172.31.0.1"}
	expect("a member's name", "IN\tA\t10.55.0.10", append(dig, "db.branch-office.zt.internal")...)
	expect("its address's name", "db.branch-office.zt.internal.", append(dig, "-x", "10.55.0.10")...)
	run(t, s.VPC, "ip", "route", "add", "10.55.0.0/24", "via", "172.31.0.1")
	expect("a rule about it", " 0% packet loss", "ping", "-c", "2", "-i", "0.2", "-W", "1", "10.55.0.10")
	set(s.OfficeAddr, map[string]any{"authorized": false})
	expect("a member that isn't let in", "status: NXDOMAIN", append(dig, "db.branch-office.zt.internal")...)
	testwait.NoError(t, 60*time.Second, func() error {
		x, err := s.GatewayAPI.Explain(ctx, control.Question{Protocol: "icmp", Source: netip.MustParseAddrPort("172.31.0.10:0"), Destination: netip.MustParseAddrPort("10.55.0.10:0")})
		if err == nil && x.Verdict != "drop" {
			err = fmt.Errorf("%s by %s", x.Verdict, x.RuleText)
		}
		return err
	})
}
