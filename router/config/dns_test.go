package config

import (
	"strings"
	"testing"
)

func TestDNS(t *testing.T) {
	c := loadText(t, `
vpc: {sources: [172.31.0.0/16]}
networks: [{id: "8056c2e21c000001", allow_dns: true}]
dns:
  listen: [172.31.0.5, "172.31.0.5:5353", "fd31::5", "[fd31::5]:54"]
  zone: ZT.Example.
  upstreams: [169.254.169.253, "127.0.0.53:53"]
  rate_per_client: 7
  hosts: [{name: DB, network: "8056c2e21c000001", addresses: [10.0.0.10, "fd00::10"]}, {name: "7", network: "8056c2e21c000001", addresses: "::ffff:10.0.0.7"}]
`)
	got := strings.Join(append(append(texts(c.DNS.Listen), texts(c.DNS.Upstreams)...), texts(c.DNS.Hosts)...), ", ")
	want := "172.31.0.5:53, 172.31.0.5:5353, [fd31::5]:53, [fd31::5]:54, 169.254.169.253:53, 127.0.0.53:53, " +
		"db in 8056c2e21c000001 is 10.0.0.10 fd00::10, 7 in 8056c2e21c000001 is 10.0.0.7"
	if got != want || c.DNS.Zone != "zt.example" || c.DNS.Rate != 7 || !c.Networks[0].AllowDNS {
		t.Errorf("%s, zone %s, rate %d", got, c.DNS.Zone, c.DNS.Rate)
	}
	if c := loadText(t, "{}"); len(c.DNS.Listen) != 0 || c.DNS.Zone != "zt.internal" || c.DNS.Rate != 100 {
		t.Errorf("by default: %+v", c.DNS)
	}
	const sources = "vpc: {sources: [172.31.0.0/16]}\n"
	for text, want := range map[string]string{
		"dns: {listen: [172.31.0.5]}":                                                    "everybody would be answered",
		"vpc: {sources: [172.31.0.0/16, \"::/0\"]}\ndns: {listen: [172.31.0.5]}":         "everybody would be answered",
		sources + "dns: {listen: [0.0.0.0]}":                                             "one by one",
		sources + "dns: {listen: [\"[::]:53\"]}":                                         "one by one",
		sources + "dns: {listen: [127.0.0.1]}":                                           "clients can't reach it",
		sources + "dns: {listen: [224.0.0.251]}":                                         "give ADDRESS or ADDRESS:PORT",
		sources + "dns: {listen: [\"fe80::1%eth0\"]}":                                    "give ADDRESS or ADDRESS:PORT",
		sources + "dns: {listen: [\"172.31.0.5:0\"]}":                                    "give ADDRESS or ADDRESS:PORT",
		sources + "dns: {listen: [gateway]}":                                             "give ADDRESS or ADDRESS:PORT",
		sources + "dns: {listen: [172.31.0.5], upstreams: [172.31.0.5]}":                 "is where this gateway itself answers",
		"dns: {zone: \"\"}":                                                              "neither an address nor a name",
		"dns: {zone: a_b}":                                                               "neither an address nor a name",
		"dns: {zone: " + strings.Repeat("long.", 30) + "zone}":                           "is longer than 120 characters",
		"dns: {rate_per_client: 0}":                                                      "from 1 to 1000000",
		"dns: {hosts: [{name: db}]}":                                                     "an entry needs name, network and addresses",
		`dns: {hosts: [{name: a.b, network: "8056c2e21c000001", addresses: 10.0.0.1}]}`:  "without dots",
		`dns: {hosts: [{name: a_b, network: "8056c2e21c000001", addresses: 10.0.0.1}]}`:  "letters, digits and hyphens",
		`dns: {hosts: [{name: a, network: "8056c2e21c000001", addresses: 10.0.0.0/24}]}`: "give an address",
	} {
		_, err := Load(Sources{Flags: map[string][]string{"config": {writeFile(t, text)}}})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}
