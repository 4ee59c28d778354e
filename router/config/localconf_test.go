package config

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ztgate/zerotier/ztnode"
)

// A home that was moved from zerotier-one brings its settings along; ours win, and
// what has no counterpart is named.
func TestLocalConf(t *testing.T) {
	home := t.TempDir()
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(home, "local.conf"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	load := func(flags map[string][]string) *Config {
		t.Helper()
		if flags == nil {
			flags = map[string][]string{}
		}
		flags["home"] = []string{home}
		c, err := Load(Sources{NoFile: true, Flags: flags})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	write(`{
		"physical": {"10.0.0.0/8": {"blacklist": true}, "10.9.0.0/24": {"trustedPathId": 4711, "mtu": 8900},
			"10.9.1.0/24": {"mtu": 1}, "10.9.2.0/24": {"mtu": 20000}, "10.9.3.0/24": {"mtu": -1}, "nonsense": {}},
		"virtual": {"feedbeef12": {"try": ["10.10.20.1/9993"], "blacklist": ["192.168.0.0/24"]}, "short": {}},
		"settings": {"primaryPort": 12345, "portMappingEnabled": false, "lowBandwidthMode": true, "tcpFallbackRelay": "198.51.100.9/443",
			"allowTcpFallbackRelay": true, "encryptedHelloEnabled": true, "softwareUpdate": "apply", "multipathMode": 7, "allowManagementFrom": [], "forceTcpRelay": false}
	}`)
	c := load(nil)
	u := c.Underlay
	if c.Port != 12345 || u.PortMapping || !u.LowBandwidth || u.TCPRelay != "198.51.100.9:443" {
		t.Errorf("port %d, underlay %+v", c.Port, u)
	}
	if u.SealedHello != ztnode.SealedHelloAlways {
		t.Errorf("sealed HELLOs: %v", u.SealedHello)
	}
	if got := strings.Join(texts(u.Physical), ", "); got != "10.9.0.0/24 mtu 8900 trusted_path 4711, 10.9.1.0/24 mtu 510, 10.9.2.0/24 mtu 10324, 10.9.3.0/24, 10.0.0.0/8 blacklist" {
		t.Errorf("physical %v", u.Physical)
	}
	if len(u.Virtual) != 1 || u.Virtual[0].String() != "feedbeef12 try 10.10.20.1:9993 blacklist 192.168.0.0/24" {
		t.Errorf("virtual %v", u.Virtual)
	}
	if o := c.Origin("port"); !strings.HasSuffix(o, "local.conf") {
		t.Errorf("port comes from %q", o)
	}
	warnings := strings.Join(c.Warnings, "\n")
	for _, want := range []string{"multipathMode, softwareUpdate", "MTU 510 of 10.9.1.0/24", `physical "nonsense"`, `virtual "short"`} {
		if !strings.Contains(warnings, want) {
			t.Errorf("warnings %q don't name %s", warnings, want)
		}
	}
	if c := load(map[string][]string{"port": {"9994"}}); c.Port != 9994 {
		t.Errorf("with --port: %d", c.Port)
	}
	if err := os.Mkdir(filepath.Join(home, "networks.d"), 0o700); err != nil {
		t.Fatal(err)
	}
	const id ztnode.NetworkID = 0x8056c2e21c000001
	for _, tt := range []struct {
		text         string
		flags        map[string][]string
		global, exit bool
		warning      string
	}{
		{text: "allowManaged=1\nallowGlobal=1\nallowDefault=0\nallowDNS=0\n", global: true},
		{text: "allowManaged=1\nallowGlobal=1\nallowDefault=1\nallowDNS=0\n", global: true, exit: true},
		{text: "allowGlobal=1\nallowDefault=1\n", flags: map[string][]string{"network": {id.String()}}, global: true, exit: true},
		{text: "allowGlobal=1\nallowDefault=1\n", flags: map[string][]string{"config": {writeFile(t, "networks: [{id: "+id.String()+", allow_default: false}]")}}, global: true},
		{text: "allowManaged=0\nallowDefault=0\n", warning: "allowManaged=0 has no effect"},
	} {
		if err := os.WriteFile(filepath.Join(home, "networks.d", id.String()+".local.conf"), []byte(tt.text), 0o600); err != nil {
			t.Fatal(err)
		}
		c := load(tt.flags)
		if n := c.Network(id); n.ID != id || n.AllowGlobal != tt.global || n.AllowDefault != tt.exit {
			t.Errorf("%q with %v: %+v", tt.text, tt.flags, n)
		}
		if !strings.Contains(strings.Join(c.Warnings, "\n"), tt.warning) {
			t.Errorf("%q: warnings %q", tt.text, c.Warnings)
		}
	}
	if err := os.RemoveAll(filepath.Join(home, "networks.d")); err != nil {
		t.Fatal(err)
	}
	write(`{"settings": {"allowTcpFallbackRelay": false, "primaryPort": "x"}}`)
	if c := load(nil); c.Underlay.TCPRelay != "off" || c.Port != DefaultPort || len(c.Warnings) != 1 || !strings.Contains(c.Warnings[0], "primaryPort") {
		t.Errorf("relay %q, port %d, warnings %q", c.Underlay.TCPRelay, c.Port, c.Warnings)
	}
	write(`{"settings": {"encryptedHelloEnabled": false}}`)
	if c := load(nil); c.Underlay.SealedHello != ztnode.SealedHelloOff || !strings.HasSuffix(c.Origin("sealed_hello"), "local.conf") {
		t.Errorf("sealed HELLOs: %v from %q", c.Underlay.SealedHello, c.Origin("sealed_hello"))
	}
	write(`{"settings": {"encryptedHelloEnabled": 7}}`)
	if c := load(nil); c.Underlay.SealedHello != ztnode.SealedHelloOff || len(c.Warnings) != 1 || !strings.Contains(c.Warnings[0], "encryptedHelloEnabled") {
		t.Errorf("sealed HELLOs: %v, warnings %q", c.Underlay.SealedHello, c.Warnings)
	}
	for _, text := range []string{"{", `{"physical": 7}`, `{"settings": {"primaryPort": 12345}}` + strings.Repeat(" ", maxLocalConf)} {
		write(text)
		if c := load(nil); len(c.Warnings) != 1 || !strings.Contains(c.Warnings[0], "is not used") || c.Port != DefaultPort {
			t.Errorf("%.20q: warnings %q", text, c.Warnings)
		}
	}
}

// Of the networks and peers of a home's local.conf none is used where ours are given, and of the networks so many.
func TestLocalConfRecords(t *testing.T) {
	home := t.TempDir()
	var networks []string
	for i := range maxPhysical + 1 {
		networks = append(networks, fmt.Sprintf(`"10.%d.0.0/16": {"mtu": 1400}`, i))
	}
	text := fmt.Sprintf(`{"physical": {%s}, "virtual": {"feedbeef12": {"try": ["10.10.20.1/9993"]}}}`, strings.Join(networks, ","))
	if err := os.WriteFile(filepath.Join(home, "local.conf"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string][2]string{
		"":                                      {"32", "feedbeef12 try 10.10.20.1:9993"},
		"physical: [{network: 192.168.0.0/16}]": {"192.168.0.0/16", "feedbeef12 try 10.10.20.1:9993"},
		"virtual: [{id: a1b2c3d4e5, try: [\"198.51.100.7:9993\"]}]": {"32", "a1b2c3d4e5 try 198.51.100.7:9993"},
	} {
		c, err := Load(Sources{Flags: map[string][]string{"home": {home}, "config": {writeFile(t, file)}}})
		if err != nil {
			t.Fatal(err)
		}
		physical := strings.Join(texts(c.Underlay.Physical), ", ")
		if len(c.Underlay.Physical) > 1 {
			physical = fmt.Sprint(len(c.Underlay.Physical))
		}
		if virtual := strings.Join(texts(c.Underlay.Virtual), ", "); physical != want[0] || virtual != want[1] {
			t.Errorf("%q: physical %s, virtual %s, want %s", file, physical, virtual, want)
		}
	}
}
