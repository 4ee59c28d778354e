package rulelang

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"ztgate/zerotier/vl2"
)

// brief writes rules in one line.
func brief(t *testing.T, rules []vl2.Rule) string {
	t.Helper()
	var out []string
	for _, r := range rules {
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		var m map[string]any
		if err := json.Unmarshal(b, &m); err != nil {
			t.Fatal(err)
		}
		s := strings.ToLower(strings.TrimPrefix(strings.TrimPrefix(m["type"].(string), "MATCH_"), "ACTION_"))
		if m["or"] == true {
			s = "or " + s
		}
		if m["not"] == true {
			s = "!" + s
		}
		for _, k := range []string{"zt", "address", "length", "vlanId", "vlanPcp", "vlanDei", "etherType", "ipProtocol", "mac", "ip", "mask", "start", "end", "icmpType", "icmpCode", "probability", "id", "value"} {
			if v, ok := m[k]; ok {
				s += fmt.Sprintf(" %v", v)
			}
		}
		out = append(out, s)
	}
	return strings.Join(out, "; ")
}

func TestCompile(t *testing.T) {
	tests := []struct{ name, src, want string }{
		{"empty", "# nothing\n", ""},
		{"default", "drop\n\tnot ethertype ipv4 # frame is not ipv4\n\tand not ethertype arp\n\tand not ethertype ipv6\n;\naccept;",
			"!ethertype 2048; !ethertype 2054; !ethertype 34525; drop; accept"},
		{"or not", "drop not ethertype ipv4 or not chr ipauth;", "!ethertype 2048; !or characteristics 1000000000000000; drop"},
		{"case", "ACCEPT IpProtocol TCP AND DPORT 0x50-443;", "ip_protocol 6; ip_dest_port_range 80 443; accept"},
		{"several ports", "accept ipprotocol tcp and dport 443 or dport 80;", "ip_protocol 6; ip_dest_port_range 443 443; or ip_dest_port_range 80 80; accept"},
		{"flags", "break chr tcp_syn and not chr tcp_ack,tcp_rst;", "characteristics 0000000000000002; !characteristics 0000000000000014; break"},
		{"addresses", "accept ztsrc FCD8055969 ztdest fcd8055969 macsrc 01:02:03:04:05:06 macdest 010203040506;",
			"source_zerotier_address fcd8055969; dest_zerotier_address fcd8055969; mac_source 01:02:03:04:05:06; mac_dest 01:02:03:04:05:06; accept"},
		{"ip", "accept ipsrc 10.0.0.0/8 ipdest fd00::/8;", "ipv4_source 10.0.0.0/8; ipv6_dest fd00::/8; accept"},
		{"icmp", "accept icmp 8 -1 or icmp 3 4;", "icmp 8 <nil>; or icmp 3 4; accept"},
		{"numbers", "drop vlan 5 vlanpcp 3 vlandei 1 framesize 100-200 iptos 0xfc 8-16 random 0.5;",
			"vlan_id 5; vlan_pcp 3; vlan_dei 1; frame_size_range 100 200; ip_tos 252 8 16; random 2.147483647e+09; drop"},
		{"targets", "tee -1 fcd8055969 ethertype arp; watch 64 fcd8055969; redirect fcd8055969 ipprotocol udp; priority;",
			"ethertype 2054; tee fcd8055969 0; watch fcd8055969 64; ip_protocol 17; redirect fcd8055969; priority"},
		{"tag", "tag dep id 7 enum 100 sales enum 200 eng flag 3 boss flag boss,0 all default eng;\naccept tdiff dep 0; drop tseq dep sales treq dep all teq 9 1 tand dep boss tor dep 0 txor dep 1;",
			"tags_difference 7 0; accept; tag_sender 7 100; tag_receiver 7 9; tags_equal 9 1; tags_bitwise_and 7 8; tags_bitwise_or 7 0; tags_bitwise_xor 7 1; drop"},
		{"macro", "macro open($proto,$port) accept ipprotocol $proto and dport $port; ;\nmacro both( $p ) include open(tcp,$p) include open(udp, $p) ;\ninclude both(53)\ndrop;",
			"ip_protocol 6; ip_dest_port_range 53 53; accept; ip_protocol 17; ip_dest_port_range 53 53; accept; drop"},
	}
	for _, tt := range tests {
		p, err := Compile(tt.src)
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		if got := brief(t, p.Rules); got != tt.want {
			t.Errorf("%s:\ngot  %s\nwant %s", tt.name, got, tt.want)
		}
	}
}

func TestDefinitions(t *testing.T) {
	p, err := Compile(`
cap superuser
	id 1000 # arbitrary
	accept; # everything
;
tag department
	id 1000
	enum 100 sales
	flag 4 x
	default sales
;
cap web id 2 default
	macro_is_no_keyword_here # in a comment? no: an error if it were not one
;
`)
	if err == nil {
		t.Fatalf("compiled: %+v", p)
	}
	p, err = Compile("cap superuser id 1000 accept; ; tag department id 1000 enum 100 sales flag 4 x default sales; cap web id 2 default accept dport 80; break; ;")
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Rules) != 0 || len(p.Capabilities) != 2 || len(p.Tags) != 1 {
		t.Fatalf("%+v", p)
	}
	if c := p.Capabilities[1]; c.Name != "web" || c.ID != 2 || !c.Default || brief(t, c.Rules) != "ip_dest_port_range 80 80; accept; break" {
		t.Errorf("%+v", c)
	}
	if g := p.Tags[0]; g.ID != 1000 || g.Default == nil || *g.Default != 100 || g.Enums["sales"] != 100 || g.Flags["x"] != 16 {
		t.Errorf("%+v", g)
	}
}

func TestErrors(t *testing.T) {
	for _, tt := range []struct {
		src       string
		line, col int
		want      string
	}{
		{"accept", 1, 1, "no ;"},
		{"accept\n  frobnicate 1;", 2, 3, "no match"},
		{"allow;", 1, 1, "no action"},
		{"accept dport 70000;", 1, 14, "up to 65535"},
		{"accept dport 9-3;", 1, 14, "range"},
		{"accept dport;", 1, 8, "arguments"},
		{"accept not;", 1, 8, "must follow"},
		{"accept ipsrc 10.0.0.1;", 1, 14, "ADDRESS/BITS"},
		{"accept ethertype foo;", 1, 18, "neither"},
		{"accept chr foo;", 1, 12, "characteristic"},
		{"accept tdiff nosuch 0;", 1, 14, "neither a tag"},
		{"tag x id 1 enum 1 a; accept teq x b;", 1, 35, "no value"},
		{"tag x enum 1 a;", 1, 5, "no id"},
		{"tag x id 1; tag X id 2;", 1, 17, "twice"},
		{"tag x id 1; tag y id 1;", 1, 17, "another one"},
		{"tag drop id 1;", 1, 5, "reserved"},
		{"tag dport id 1;", 1, 5, "reserved"},
		{"tag x id 1 default z;", 1, 20, "no value"},
		{"cap x accept; ;", 1, 5, "no id"},
		{"cap x id 1 accept;", 1, 1, "no ;"},
		{"macro a accept; ; macro a accept; ;", 1, 25, "twice"},
		{"macro a include a ; include a", 1, 17, "deep"},
		{"macro a($x) accept dport $x; ; include a", 1, 40, "takes 1"},
		{nested(18), 1, 0, "deep"},
		{"include b", 1, 9, "no macro"},
		{"accept dport $x;", 1, 14, "no parameter"},
		{"tee 5 nobody;", 1, 7, "10 hexadecimal"},
		{"tee 5;", 1, 1, "missing"},
		{"redirect fcd8055969 macsrc zz;", 1, 21, "mac"},
		{strings.Repeat("accept;", vl2.MaxRules+1), 1, 7*vl2.MaxRules + 1, "more than"},
		{"cap x id 1 " + strings.Repeat("accept;", 65) + ";", 1, 12 + 7*64, "more than 64"},
		{"macro a " + strings.Repeat("accept;", 600) + "; macro b include a include a ; include b", 1, 0, "more than"},
		{"macro z ; macro y " + strings.Repeat("include z ", 300) + "; macro x " + strings.Repeat("include y ", 300) + "; include x", 1, 0, "unfold"},
	} {
		_, err := Compile(tt.src)
		var e *Error
		if !errors.As(err, &e) || !strings.Contains(e.Message, tt.want) {
			t.Errorf("%.60q: %v, want %q", tt.src, err, tt.want)
			continue
		}
		if tt.col != 0 && (e.Line != tt.line || e.Column != tt.col) {
			t.Errorf("%.60q: at %d:%d, want %d:%d", tt.src, e.Line, e.Column, tt.line, tt.col)
		}
	}
}

func FuzzCompile(f *testing.F) {
	f.Add("macro a($x) accept dport $x; ; include a(80) drop not chr ipauth or random 0.1;")
	f.Add("tag d id 7 enum 1 a flag 2 b default a; cap c id 1 default accept tdiff d 0; ; tee 1 fcd8055969;")
	f.Fuzz(func(t *testing.T, src string) {
		p, err := Compile(src)
		if err != nil {
			return
		}
		again, err := vl2.ParseRules(vl2.AppendRules(nil, p.Rules), vl2.MaxRules)
		if err != nil || len(again) != len(p.Rules) {
			t.Errorf("rules that can't be read: %v", err)
		}
	})
}

// nested is macros of which each includes the one before it.
func nested(n int) string {
	b := "macro m0 accept; ; "
	for i := 1; i < n; i++ {
		b += fmt.Sprintf("macro m%d include m%d ; ", i, i-1)
	}
	return b + fmt.Sprintf("include m%d", n-1)
}
