package gateway_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ztgate/internal/testwait"
	"ztgate/netstack"
	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/router/gateway/gatewaytest"
)

// TestClientNames: clients are told addresses by which they reach hosts, and no others.
func TestClientNames(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ztgate.yaml")
	text := `
vpc: {sources: [172.31.0.0/16]}
networks: [{id: "` + nwid.String() + `", allow_dns: true}]
dns:
  hosts:
    - {name: db, network: "` + nwid.String() + `", addresses: [10.0.0.10, "fd00::10"]}
    - {name: vpc, network: "` + nwid.String() + `", addresses: [172.31.0.9]}
    - {name: meta, network: "` + nwid.String() + `", addresses: [169.254.169.254, "64:ff9b::a9fe:a9fe", "::ffff:127.0.0.1"]}
    - {name: twin, network: "` + nwid.String() + `", addresses: [10.0.0.20]}
    - {name: twin, network: "` + nwid.String() + `", addresses: [10.0.0.21]}
    - {name: db, network: "1111111111000002", addresses: [10.0.0.99]}
`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	r := serve(t, control.ModeGateway, map[string][]string{"config": {path}})
	n := okNetwork()
	n.DNSDomain, n.DNSServers = "office.example", []netip.Addr{netip.MustParseAddr("10.0.0.53")}
	r.setNetwork(t, n)
	if _, err := r.client.Ping(t.Context(), control.PingRequest{Host: "10.147.17.9"}); err != nil { // so that it is known
		t.Fatal(err)
	}
	resolve := func(name, qtype string) string {
		x, err := r.client.Resolve(t.Context(), control.ResolveRequest{Name: name, Type: qtype})
		if err != nil {
			return err.Error()
		}
		out := x.Code
		for _, v := range x.Records {
			out += " " + v.Value
		}
		if !x.Off || x.From != "zone zt.internal" {
			t.Errorf("%s: %+v", name, x)
		}
		return out
	}
	const zone = ".office.zt.internal"
	for _, tt := range [][3]string{
		{"db" + zone, "A", "NOERROR 10.0.0.10"},
		{"db" + zone, "AAAA", "NOERROR"}, // no way there
		{"vpc" + zone, "A", "NOERROR"},
		{"meta" + zone, "A", "NOERROR"},
		{"meta" + zone, "AAAA", "NOERROR"},
		{"twin" + zone, "A", "NOERROR 10.0.0.21"}, // the later one says more
		{"db.1111111111000002.zt.internal", "A", "NXDOMAIN"},
		{"fcd8055969" + zone, "A", "NOERROR 10.147.17.5"},
		{gatewaytest.OfficeAddress.String() + zone, "A", "NOERROR 10.147.17.9"},
		{"10.0.0.10", "", "NOERROR db.office.zt.internal."},
		{"::ffff:10.147.17.9", "", "NOERROR " + gatewaytest.OfficeAddress.String() + ".office.zt.internal."},
		{"172.31.0.9", "", "resolve 9.0.31.172.in-addr.arpa.: nobody is asked for it"},
		{"example.com", "", "resolve example.com: nobody is asked for it"},
	} {
		if got := resolve(tt[0], tt[1]); got != tt[2] {
			t.Errorf("%s %s: %q, want %q", tt[0], tt[1], got, tt[2])
		}
	}
	maps := []netstack.AddressMap{{Hosts: netstack.OverlaySide, Real: netip.MustParsePrefix("10.0.0.0/24"), Alias: netip.MustParsePrefix("10.77.0.0/24")}}
	if err := r.engine.SetTranslation(nil, maps); err != nil {
		t.Fatal(err)
	}
	for _, tt := range [][3]string{{"db" + zone, "A", "NOERROR 10.77.0.10"}, {"10.77.0.10", "", "NOERROR db.office.zt.internal."}} {
		if got := resolve(tt[0], tt[1]); got != tt[2] {
			t.Errorf("behind a map: %s: %q, want %q", tt[0], got, tt[2])
		}
	}
	for _, bad := range []control.ResolveRequest{{}, {Name: "a..b"}, {Name: "a", Type: "ANY"}, {Name: "a", Type: "AXFR"}, {Name: "a", Type: "x"}, {Name: strings.Repeat("a.", 200)}} {
		if _, err := r.client.Resolve(t.Context(), bad); fault.ExitCode(err) != 2 {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	// A name of the network's own domain goes over the overlay, where nobody answers it here.
	if _, err := r.client.Resolve(t.Context(), control.ResolveRequest{Name: "web.office.example"}); err == nil || !strings.Contains(err.Error(), "10.77.0.53:53 of network "+nwid.String()) {
		t.Error(err)
	}
	if _, err := r.client.Ping(t.Context(), control.PingRequest{Host: "db" + zone}); err == nil {
		t.Error("a service without names knows names of the zone")
	}
	m := serve(t, control.ModeMember, nil)
	if _, err := m.client.Resolve(t.Context(), control.ResolveRequest{Name: "a"}); fault.ExitCode(err) != 2 {
		t.Errorf("a member answers clients: %v", err)
	}
}

// TestClientNamesHealth: health and status say where clients aren't answered, and what isn't
// used.
func TestClientNamesHealth(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ztgate.yaml")
	text := "vpc: {sources: [172.31.0.0/16]}\ndns: {listen: [192.0.2.1]}\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	r := serve(t, control.ModeGateway, map[string][]string{"config": {path}})
	n := okNetwork()
	n.DNSDomain, n.DNSServers = "office.example", []netip.Addr{netip.MustParseAddr("10.0.0.53")}
	r.setNetwork(t, n)
	const want = "dns: questions for names are not answered at 192.0.2.1:53: this host doesn't have the address"
	testwait.For(t, patience, "health", func() bool {
		h, err := r.client.Health(t.Context())
		if err != nil {
			return false
		}
		for _, c := range h.Failed() {
			if c.Severity == control.Degraded && c.Name+": "+c.Reason == want && strings.Contains(c.Remedy, "dns.listen") {
				return true
			}
		}
		return false
	})
	testwait.For(t, patience, "status", func() bool {
		st, err := r.client.Status(t.Context())
		return err == nil && st.DNS != nil && len(st.DNS.Unused) == 1 && strings.Contains(st.DNS.Unused[0], "set allow_dns") && len(st.DNS.Domains) == 0
	})
}
