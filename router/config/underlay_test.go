package config

import (
	"strings"
	"testing"

	"ztgate/router/fault"
)

func TestUnderlay(t *testing.T) {
	path := writeFile(t, `
low_bandwidth: true
port_mapping: off
physical:
  - {network: 10.0.0.0/8, mtu: 8900}
  - {network: "192.0.2.0/24", blacklist: true}
  - {network: 198.51.100.0/24, trusted_path: 4711}
virtual:
  - {id: A1B2C3D4E5, try: ["198.51.100.7:9993", 198.51.100.8/9993], blacklist: [10.0.0.0/8]}
`)
	c, err := Load(Sources{Flags: map[string][]string{"config": {path}}})
	if err != nil {
		t.Fatal(err)
	}
	u := c.Underlay
	if !u.LowBandwidth || u.PortMapping || len(u.Physical) != 3 || u.Physical[0].MTU != 8900 || !u.Physical[1].Blacklist || u.Physical[2].TrustedPath != 4711 {
		t.Errorf("%+v", u)
	}
	if len(u.Virtual) != 1 || u.Virtual[0].Address != "a1b2c3d4e5" || len(u.Virtual[0].Try) != 2 || len(u.Virtual[0].Blacklist) != 1 {
		t.Errorf("%+v", u.Virtual)
	}
	shown := ""
	for _, v := range c.Values() {
		if strings.HasPrefix(v.Key, "physical") || strings.HasPrefix(v.Key, "virtual") {
			shown += v.Value.(string) + "\n"
		}
	}
	for _, want := range []string{"10.0.0.0/8 mtu 8900", "192.0.2.0/24 blacklist", "trusted_path 4711", "a1b2c3d4e5 try 198.51.100.7:9993"} {
		if !strings.Contains(shown, want) {
			t.Errorf("config show lacks %q:\n%s", want, shown)
		}
	}
}

func TestUnderlayDefaults(t *testing.T) {
	c, err := Load(Sources{NoFile: true})
	if err != nil {
		t.Fatal(err)
	}
	if u := c.Underlay; !u.PortMapping || u.LowBandwidth || u.TCPRelay != "auto" {
		t.Errorf("%+v", u)
	}
}

func TestUnderlayErrors(t *testing.T) {
	for text, want := range map[string]string{
		"physical: [{network: 10.0.0.0/8, mtu: 100}]":        "510 to 10324",
		"physical: [{mtu: 1500}]":                            "no network",
		"physical: [{network: 10.0.0.0/8, trusted_path: 0}]": "above 0",
		"port_mapping: maybe":                                "true or false",
		"physical: {a: b}":                                   "want a list",
		"physical: [{netwrok: 10.0.0.0/8}]":                  "physical.network",
		"virtual: [{id: xyz, try: [\"198.51.100.7:9993\"]}]": "10 hex digits",
		"virtual: [{id: a1b2c3d4e5, try: [nowhere]}]":        "ADDRESS/PORT",
	} {
		path := writeFile(t, text)
		_, err := Load(Sources{Flags: map[string][]string{"config": {path}}})
		if err == nil || !strings.Contains(err.Error(), want) || fault.ExitCode(err) != 2 {
			t.Errorf("%s: %v, want an error that says %q", text, err, want)
		}
	}
}
