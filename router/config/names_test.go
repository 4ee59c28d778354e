package config

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const namesFile = `
vpc: {sources: [172.31.0.0/16]}
forwards:
  - {listen: "tcp/8443", to: "DB.office.example:443"}
  - {listen: "tcp/[fd00::1]:8443", to: "db.office.example:443"}
  - {listen: "udp/53", to: "10.0.0.53:53"}
policy:
  allow: ["tcp:db.office.example:443"]
  rules:
    - {action: reject, from: [172.31.9.0/24, bad], to: 10.0.0.0/24}
    - {action: accept, from: [172.31.8.0/24, good]}
    - {action: accept, direction: in, to: good}
targets: ["tcp://db.office.example:443", "icmp://ping.office.example.", "icmp://10.0.0.9"]
`

func loadText(t *testing.T, text string) *Config {
	t.Helper()
	c, err := Load(Sources{Flags: map[string][]string{"config": {writeFile(t, text)}}})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func addresses(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

// state writes down what a resolved configuration does.
func state(c *Config) string {
	var b strings.Builder
	line := func(s string) { b.WriteString(s + "\n") }
	for _, f := range c.Forwards {
		line(f.String() + ", to " + f.To.String() + ", listens at " + f.Listen.String())
	}
	for _, r := range c.Policy.Rules {
		line(r.Action + " from " + strings.Join(texts(r.From), ",") + " to " + strings.Join(texts(r.To), ","))
	}
	for _, t := range c.Targets {
		line(t.String() + " at " + t.Addr.Addr().String())
	}
	for _, u := range c.Unresolved {
		line(u)
	}
	return b.String()
}

func TestResolve(t *testing.T) {
	c := loadText(t, namesFile)
	if d := cmp.Diff([]string{"bad", "db.office.example", "good", "ping.office.example"}, c.Names()); d != "" {
		t.Error("names: " + d)
	}
	const nothing = `udp/0.0.0.0:53 to 10.0.0.53:53, to 10.0.0.53:53, listens at 0.0.0.0:53
accept from  to ::/128
reject from  to 10.0.0.0/24
accept from 172.31.8.0/24 to 
accept from  to ::/128
tcp://db.office.example:443 at invalid IP
icmp://ping.office.example at invalid IP
icmp://10.0.0.9 at 10.0.0.9
forward tcp/8443 to db.office.example:443 is not served: the name db.office.example has no address yet
forward tcp/[fd00::1]:8443 to db.office.example:443 is not served: the name db.office.example has no address yet
target tcp://db.office.example:443: the name db.office.example has no address yet
target icmp://ping.office.example: the name ping.office.example has no address yet
policy rule 0 (accept proto tcp to db.office.example ports 443 direction out) accepts nothing for db.office.example: the name has no address yet
policy rule 1 (reject from bad to 10.0.0.0/24) refuses more than it says: the name bad has no address yet
policy rule 2 (accept from 172.31.8.0/24,good) accepts nothing for good: the name has no address yet
policy rule 3 (accept to good direction in) accepts nothing for good: the name has no address yet
`
	for _, tt := range []struct {
		name    string
		answers map[string][]netip.Addr
		want    string
	}{
		{"nothing", nil, nothing},
		{"empty answers", map[string][]netip.Addr{"db.office.example": {}, "good": nil}, nothing},
		{"all", map[string][]netip.Addr{
			"db.office.example": addresses("fd00::10", "10.0.0.10", "10.0.0.11"), "bad": addresses("172.31.7.7"),
			"good": addresses("172.31.0.1", "fd00::2"), "ping.office.example": addresses("fd00::9"),
		}, `tcp/0.0.0.0:8443 to db.office.example:443 (10.0.0.10), to 10.0.0.10:443, listens at 0.0.0.0:8443
tcp/[fd00::1]:8443 to db.office.example:443 (fd00::10), to [fd00::10]:443, listens at [fd00::1]:8443
udp/0.0.0.0:53 to 10.0.0.53:53, to 10.0.0.53:53, listens at 0.0.0.0:53
accept from  to fd00::10/128,10.0.0.10/32,10.0.0.11/32
reject from 172.31.9.0/24,172.31.7.7/32 to 10.0.0.0/24
accept from 172.31.8.0/24,172.31.0.1/32,fd00::2/128 to 
accept from  to 172.31.0.1/32,fd00::2/128
tcp://db.office.example:443 at 10.0.0.10
icmp://ping.office.example at fd00::9
icmp://10.0.0.9 at 10.0.0.9
`},
		{"IPv6 alone", map[string][]netip.Addr{
			"db.office.example": addresses("fd00::10"), "bad": addresses("172.31.7.7"), "good": addresses("::ffff:172.31.0.1"),
			"ping.office.example": addresses("fd00::9"),
		}, `tcp/[::]:8443 to db.office.example:443 (fd00::10), to [fd00::10]:443, listens at [::]:8443
tcp/[fd00::1]:8443 to db.office.example:443 (fd00::10), to [fd00::10]:443, listens at [fd00::1]:8443
udp/0.0.0.0:53 to 10.0.0.53:53, to 10.0.0.53:53, listens at 0.0.0.0:53
accept from  to fd00::10/128
reject from 172.31.9.0/24,172.31.7.7/32 to 10.0.0.0/24
accept from 172.31.8.0/24,172.31.0.1/32 to 
accept from  to 172.31.0.1/32
tcp://db.office.example:443 at fd00::10
icmp://ping.office.example at fd00::9
icmp://10.0.0.9 at 10.0.0.9
`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := state(c)
			if d := cmp.Diff(tt.want, state(c.Resolve(tt.answers))); d != "" {
				t.Error(d)
			}
			if state(c) != before {
				t.Error("Resolve changed its configuration")
			}
		})
	}
	if d := cmp.Diff(state(c), state(c.Resolve(map[string][]netip.Addr{"good": addresses("10.0.0.1")}).Resolve(nil))); d != "" {
		t.Error("a configuration keeps addresses of the one before: " + d)
	}
}

func TestResolveFamily(t *testing.T) {
	c := loadText(t, namesFile).Resolve(map[string][]netip.Addr{"db.office.example": addresses("10.0.0.10")})
	want := "forward tcp/[fd00::1]:8443 to db.office.example:443 is not served: the name db.office.example has no IPv6 address"
	if !slices.Contains(c.Unresolved, want) {
		t.Errorf("unresolved %q, want %q", c.Unresolved, want)
	}
	text := c.Policy.Rules[0].String()
	if want := "accept proto tcp to db.office.example(10.0.0.10) ports 443 direction out"; text != want {
		t.Errorf("rule %q, want %q", text, want)
	}
}

// TestReloadKeepsAddresses proves that a reload forgets no address.
func TestReloadKeepsAddresses(t *testing.T) {
	c := loadText(t, namesFile).Resolve(map[string][]netip.Addr{"db.office.example": addresses("10.0.0.10")})
	next, changed, restart, err := c.Reload()
	if err != nil || len(changed)+len(restart) > 0 {
		t.Fatalf("changed %v, restart %v, %v", changed, restart, err)
	}
	if d := cmp.Diff(state(c), state(next)); d != "" {
		t.Error(d)
	}
}

func TestNamesShown(t *testing.T) {
	c := loadText(t, namesFile).Resolve(map[string][]netip.Addr{"good": addresses("10.0.0.1")})
	got := map[string]string{}
	for _, v := range c.Values() {
		if s, ok := v.Value.(string); ok {
			got[v.Key] = s + " from " + strings.SplitN(v.Origin, " ", 2)[0]
		}
	}
	for key, want := range map[string]string{
		"policy.default":  "drop from policy.allow",
		"policy.rules[0]": "accept proto tcp to db.office.example ports 443 direction out from file",
		"policy.rules[2]": "accept from 172.31.8.0/24,good from file",
		"forwards[0]":     "tcp/8443 to db.office.example:443 from file",
	} {
		if got[key] != want {
			t.Errorf("%s: %q, want %q", key, got[key], want)
		}
	}
}

func TestParseName(t *testing.T) {
	for s, want := range map[string]string{
		"db": "db", "DB.Office.Example": "db.office.example", "db.example.": "db.example", "1.2.3.4x": "1.2.3.4x", "a-1.xn--p1ai": "a-1.xn--p1ai",
		"10.0.0.300": "", "10.0.0": "", "10": "", "": "", ".": "", "a..b": "", "-a.b": "", "a-.b": "", "a_b.c": "", "a b": "", "db:443": "", "ä.example": "",
		strings.Repeat("a", 64) + ".b": "", strings.Repeat("a.", 127) + "b": "",
	} {
		got, err := parseName(s)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v, want %q", s, got, err, want)
		}
	}
}

func TestAllow(t *testing.T) {
	for s, want := range map[string]string{
		"tcp:10.0.0.10:443":           "accept proto tcp to 10.0.0.10/32 ports 443 direction out",
		"tcp:10.0.0.10":               "accept proto tcp to 10.0.0.10/32 direction out",
		"udp:10.0.0.0/24:8000-8099":   "accept proto udp to 10.0.0.0/24 ports 8000-8099 direction out",
		"tcp:[fd00::10]:443":          "accept proto tcp to fd00::10/128 ports 443 direction out",
		"tcp:[fd00::/64]":             "accept proto tcp to fd00::/64 direction out",
		"icmp:10.0.0.10":              "accept proto icmp to 10.0.0.10/32 direction out",
		"icmp:[fd00::10]":             "accept proto icmp to fd00::10/128 direction out",
		"tcp:db.office.example:443":   "accept proto tcp to db.office.example ports 443 direction out",
		"icmp:db":                     "accept proto icmp to db direction out",
		"icmp:10.0.0.10:1":            "!ICMP has no ports",
		"sctp:10.0.0.10:1":            "!give PROTO:HOST:PORT",
		"10.0.0.10:443":               "!give PROTO:HOST:PORT",
		"tcp":                         "!neither an address nor a name",
		"tcp:":                        "!neither an address nor a name",
		"tcp:10.0.0.300:443":          "!four numbers up to 255",
		"tcp:10.0.0.1/24:443":         "!host bits are set: write 10.0.0.0/24",
		"tcp:fd00::10:443":            "!in brackets",
		"tcp:[10.0.0.10]:443":         "!brackets are for IPv6",
		"tcp:[db.example]:443":        "!brackets are for IPv6",
		"tcp:[fd00::10]443":           "!give PROTO:HOST:PORT",
		"tcp:[fd00::10:443":           "!in brackets",
		"tcp:10.0.0.10:https":         "!give a port or a range",
		"tcp:10.0.0.10:9-1":           "!give a port or a range",
		"tcp:10.0.0.10:":              "!give a port or a range",
		"tcp:10.0.0.10:443:1":         "!in brackets",
		"tcp:[fd00::10]:443-444:more": "!give a port or a range",
	} {
		c, err := Load(Sources{NoFile: true, Flags: map[string][]string{"allow": {s}}})
		if wrong, ok := strings.CutPrefix(want, "!"); ok {
			if err == nil || !strings.Contains(err.Error(), wrong) || !strings.Contains(err.Error(), "flag --allow") {
				t.Errorf("%s: %v, want %q", s, err, wrong)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", s, err)
			continue
		}
		if text := texts(c.Policy.Rules); len(text) != 1 || text[0] != want || c.Policy.Default != "drop" || c.Policy.Allow[0].String() != s {
			t.Errorf("%s: rules %q, default %s, shown as %s, want %q", s, text, c.Policy.Default, c.Policy.Allow[0], want)
		}
	}
}

func TestAllowDefault(t *testing.T) {
	file := "policy: {default: reject, rules: [{action: accept, proto: icmp}]}"
	for _, tt := range []struct {
		name, file    string
		env           []string
		want, origin  string
		rules         int
		firstFromWhat string
	}{
		{"none", "", nil, "accept", "default", 0, ""},
		{"environment", "", []string{"ZTGATE_ALLOW=tcp:10.0.0.1:1,udp:10.0.0.1:2"}, "drop", "policy.allow", 2, "environment ZTGATE_ALLOW"},
		{"default in the file", file, []string{"ZTGATE_ALLOW=tcp:10.0.0.1:1"}, "reject", "file", 2, "environment ZTGATE_ALLOW"},
		{"default in the environment", "", []string{"ZTGATE_ALLOW=tcp:10.0.0.1:1", "ZTGATE_POLICY_DEFAULT=accept"}, "accept", "environment", 1, "environment ZTGATE_ALLOW"},
		{"empty", "", []string{"ZTGATE_ALLOW=,"}, "accept", "default", 0, ""},
		{"file", "policy: {allow: [\"icmp:10.0.0.1\"]}", nil, "drop", "policy.allow", 1, "file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := Load(Sources{Environ: tt.env, Flags: map[string][]string{"config": {writeFile(t, tt.file)}}})
			if err != nil {
				t.Fatal(err)
			}
			if c.Policy.Default != tt.want || !strings.HasPrefix(c.Origin("policy.default"), tt.origin) || len(c.Policy.Rules) != tt.rules {
				t.Errorf("default %s from %s, %d rules", c.Policy.Default, c.Origin("policy.default"), len(c.Policy.Rules))
			}
			for _, v := range c.Values() {
				if v.Key == "policy.rules[0]" && !strings.HasPrefix(v.Origin, tt.firstFromWhat) {
					t.Errorf("first rule from %s, want %s", v.Origin, tt.firstFromWhat)
				}
			}
		})
	}
}

func TestNameErrors(t *testing.T) {
	for text, want := range map[string]string{
		`forwards: [{listen: "tcp/1", to: "10.0.0.300:443"}]`:    `f:1: forwards.to: "10.0.0.300:443": host "10.0.0.300": neither an address nor a name: an IPv4`,
		`forwards: [{listen: "tcp/1", to: "db"}]`:                "give HOST:PORT",
		`forwards: [{listen: "tcp/1", to: "db:0"}]`:              "give HOST:PORT",
		`policy: {rules: [{action: drop, to: 10.0.0.300}]}`:      "neither an address nor a name: an IPv4",
		`policy: {rules: [{action: drop, from: [a, a_b]}]}`:      `"a_b": neither an address nor a name: give`,
		`policy: {rules: [{action: drop, from: [10.0.0.1/24]}]}`: "write 10.0.0.0/24",
		`targets: ["icmp://10.0.0"]`:                             `host "10.0.0": neither an address`,
		`targets: ["tcp://db"]`:                                  "give tcp://HOST:PORT",
		`vpc: {sources: [db]}`:                                   "give ADDRESS/BITS",
	} {
		l := newLoader(Sources{})
		l.yaml("f", []byte(text))
		if len(l.errs) != 1 || !strings.Contains(l.errs[0].Error(), want) {
			t.Errorf("%s: %v, want %q", text, l.errs, want)
		}
	}
}
