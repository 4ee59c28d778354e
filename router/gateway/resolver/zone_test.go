package resolver

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

func addrs(list ...string) (out []netip.Addr) {
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

// labZone has two networks.
func labZone(t testing.TB) *Zone {
	t.Helper()
	z, _ := NewZone("zt.internal", []Network{
		{ID: "8056c2e21c000001", Name: "office", Hosts: []Host{
			{ID: "1111111111", Name: "db", Addresses: addrs("10.0.0.10", "fd00::10", "10.0.0.11")},
			{ID: "2222222222", Addresses: addrs("10.0.0.20", "10.0.0.30")},
			{ID: "3333333333", Name: "new"},
			{Name: "printer", Addresses: addrs("10.0.0.30")},
			{ID: "4444444444", Name: "twin", Addresses: addrs("10.0.0.40")},
			{ID: "5555555555", Name: "twin", Addresses: addrs("10.0.0.50")},
			{ID: "6666666666", Name: "1111111111", Addresses: addrs("10.0.0.60")}, // another one's address
		}},
		{ID: "8056c2e21c000002", Name: "8056c2e21c000001", Hosts: []Host{{ID: "7777777777", Name: "db", Addresses: addrs("10.0.0.10", "10.9.0.10")}}},
		{ID: "8056c2e21c000003", Name: "office", Made: func(id string) []netip.Addr {
			if id == "8888888888" {
				return addrs("fd80::8")
			}
			return nil
		}},
		{ID: "8056c2e21c000004", Name: "ns"},
	}, addrs("172.31.0.5", "fd31::5"))
	return z
}

// ask returns what the zone says, in a few words.
func ask(z *Zone, name string, qtype uint16) string {
	m := new(dns.Msg).SetQuestion(dns.Fqdn(name), qtype)
	if !z.Covers(m.Question[0].Name) {
		return "elsewhere"
	}
	reply := new(dns.Msg).SetReply(m)
	z.answer(m.Question[0], reply)
	if reply.Rcode != dns.RcodeSuccess {
		return dns.RcodeToString[reply.Rcode]
	}
	if len(reply.Answer) == 0 {
		return "NODATA"
	}
	var out []string
	for _, rr := range reply.Answer {
		out = append(out, strings.TrimPrefix(rr.String(), rr.Header().String()))
	}
	return strings.Join(out, " ")
}

func TestZone(t *testing.T) {
	z := labZone(t)
	for _, tt := range []struct {
		name  string
		qtype uint16
		want  string
	}{
		{"db.office.zt.internal", dns.TypeA, "10.0.0.10 10.0.0.11"},
		{"DB.Office.ZT.Internal", dns.TypeAAAA, "fd00::10"},
		{"1111111111.8056c2e21c000001.zt.internal", dns.TypeA, "10.0.0.10 10.0.0.11"},
		{"db.8056c2e21c000001.zt.internal", dns.TypeA, "10.0.0.10 10.0.0.11"},
		{"db.8056c2e21c000002.zt.internal", dns.TypeA, "10.0.0.10 10.9.0.10"},
		{"2222222222.office.zt.internal", dns.TypeA, "10.0.0.20 10.0.0.30"},
		{"2222222222.office.zt.internal", dns.TypeAAAA, "NODATA"},
		{"2222222222.office.zt.internal", dns.TypeMX, "NODATA"},
		{"new.office.zt.internal", dns.TypeA, "NODATA"},
		{"printer.office.zt.internal", dns.TypeA, "10.0.0.30"},
		{"twin.office.zt.internal", dns.TypeA, "NXDOMAIN"},
		{"4444444444.office.zt.internal", dns.TypeA, "10.0.0.40"},
		{"nobody.office.zt.internal", dns.TypeA, "NXDOMAIN"},
		{"a.db.office.zt.internal", dns.TypeA, "NXDOMAIN"},
		{"db.nowhere.zt.internal", dns.TypeA, "NXDOMAIN"},
		{"office.zt.internal", dns.TypeA, "NODATA"}, // names lie below it (RFC 8020)
		{"zt.internal", dns.TypeA, "NODATA"},
		{"zt.internal", dns.TypeNS, "ns.zt.internal."},
		{"zt.internal", dns.TypeSOA, "ns.zt.internal. hostmaster.zt.internal. 1 3600 600 86400 15"},
		{"ns.zt.internal", dns.TypeA, "172.31.0.5"},
		{"ns.zt.internal", dns.TypeAAAA, "fd31::5"},
		{"x.ns.zt.internal", dns.TypeA, "NXDOMAIN"},
		{"8888888888.8056c2e21c000003.zt.internal", dns.TypeAAAA, "fd80::8"},
		{"8888888889.8056c2e21c000003.zt.internal", dns.TypeAAAA, "NXDOMAIN"},
		{"10.0.0.10.in-addr.arpa", dns.TypePTR, "db.office.zt.internal."}, // the first network's
		{"10.0.9.10.in-addr.arpa", dns.TypePTR, "db.8056c2e21c000002.zt.internal."},
		{"20.0.0.10.in-addr.arpa", dns.TypePTR, "2222222222.office.zt.internal."},
		{"30.0.0.10.IN-ADDR.ARPA", dns.TypePTR, "printer.office.zt.internal."},
		{"40.0.0.10.in-addr.arpa", dns.TypePTR, "4444444444.office.zt.internal."},
		{"20.0.0.10.in-addr.arpa", dns.TypeA, "NODATA"},
		{"21.0.0.10.in-addr.arpa", dns.TypePTR, "elsewhere"},
		{"0.0.10.in-addr.arpa", dns.TypePTR, "elsewhere"},
		{"020.0.0.10.in-addr.arpa", dns.TypePTR, "elsewhere"},
		{"zt.internal.example", dns.TypeA, "elsewhere"},
		{"xzt.internal", dns.TypeA, "elsewhere"},
		{"internal", dns.TypeA, "elsewhere"},
	} {
		if got := ask(z, tt.name, tt.qtype); got != tt.want {
			t.Errorf("%s %s: %s, want %s", tt.name, dns.TypeToString[tt.qtype], got, tt.want)
		}
	}
	six, _ := dns.ReverseAddr("fd00::10")
	if got := ask(z, six, dns.TypePTR); got != "db.office.zt.internal." {
		t.Errorf("%s: %s", six, got)
	}
	for _, bad := range []string{strings.Replace(six, ".", "", 1), strings.Replace(six, "0", "g", 1), "0." + six, strings.Replace(six, "0.1", "0-1", 1)} {
		if got := ask(z, bad, dns.TypePTR); got != "elsewhere" {
			t.Errorf("%s: %s", bad, got)
		}
	}
}

// TestZoneNegative: an answer that there is nothing says for how long.
func TestZoneNegative(t *testing.T) {
	z := labZone(t)
	for _, name := range []string{"nobody.office.zt.internal.", "new.office.zt.internal.", "zt.internal."} {
		m := new(dns.Msg).SetQuestion(name, dns.TypeTXT)
		reply := new(dns.Msg).SetReply(m)
		z.answer(m.Question[0], reply)
		if len(reply.Ns) != 1 || !reply.Authoritative {
			t.Fatalf("%s: %v", name, reply)
		}
		if soa, ok := reply.Ns[0].(*dns.SOA); !ok || soa.Hdr.Name != "zt.internal." || soa.Hdr.Ttl != TTL || soa.Minttl != TTL {
			t.Errorf("%s: %v", name, reply.Ns)
		}
	}
}

// TestZoneTaken: nobody takes the name of another by calling himself or his network like it.
func TestZoneTaken(t *testing.T) {
	_, lost := NewZone("zt.internal", []Network{
		{ID: "8056c2e21c000001", Name: "office", Hosts: []Host{{ID: "1111111111", Name: "2222222222"}, {ID: "2222222222"}, {ID: "3333333333", Name: "a"}, {ID: "4444444444", Name: "a"}, {ID: "5555555555", Name: "a"}}},
		{ID: "8056c2e21c000002", Name: "office"},
		{ID: "8056c2e21c000003", Name: "8056c2e21c000001"},
		{ID: "8056c2e21c000004", Name: "ns"},
	}, nil)
	want := []string{
		"nobody is called 2222222222.office.zt.internal: several hosts of network 8056c2e21c000001 would be",
		"nobody is called a.office.zt.internal: several hosts of network 8056c2e21c000001 would be",
		"network 8056c2e21c000002 isn't called office.zt.internal: that is another name",
		"network 8056c2e21c000003 isn't called 8056c2e21c000001.zt.internal: that is another name",
		"network 8056c2e21c000004 isn't called ns.zt.internal: that is another name",
	}
	if !slices.Equal(lost, want) {
		t.Errorf("lost %q\nwant %q", lost, want)
	}
}

// TestZoneGone: nobody is gone for sure only where all hosts are known.
func TestZoneGone(t *testing.T) {
	z, _ := NewZone("zt.internal", []Network{
		{ID: "8056c2e21c000001", Name: "ours", All: true, Hosts: []Host{{ID: "1111111111", Name: "db", Addresses: addrs("10.0.0.10")}, {ID: "2222222222", Name: "new"}}},
		{ID: "8056c2e21c000002", Name: "theirs", Hosts: []Host{{ID: "2222222222"}}},
	}, nil)
	for name, want := range map[string]bool{
		"db.ours.zt.internal": false, "new.ours.zt.internal": true, "nobody.ours.zt.internal": true, "1111111111.Ours.zt.internal": false,
		"nobody.theirs.zt.internal": false, "2222222222.theirs.zt.internal": false, "nobody.nowhere.zt.internal": false, "zt.internal": false, "ours.zt.internal": false,
	} {
		if got := z.Gone(name); got != want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestLabel(t *testing.T) {
	for text, want := range map[string]string{
		"office": "office", "My Office": "my-office", " Büro 2 (old) ": "b-ro-2-old", "--x--": "x", "": "", "ÄÖ": "", "a.b": "a-b",
		strings.Repeat("x", 100): strings.Repeat("x", 63), strings.Repeat("x", 62) + " y": strings.Repeat("x", 62),
	} {
		if got := Label(text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}
