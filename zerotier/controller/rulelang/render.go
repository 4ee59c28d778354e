package rulelang

import (
	"encoding/json"
	"math"
	"net/netip"
	"strconv"
	"strings"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl2"
)

// bits of characteristics by name (chapter 03 §6.3).
var characteristics = map[string]uint{
	"inbound": 63, "multicast": 62, "broadcast": 61, "ipauth": 60, "macauth": 59,
	"tcp_fin": 0, "tcp_syn": 1, "tcp_rst": 2, "tcp_psh": 3, "tcp_ack": 4, "tcp_urg": 5,
	"tcp_ece": 6, "tcp_cwr": 7, "tcp_ns": 8, "tcp_rs2": 9, "tcp_rs1": 10, "tcp_rs0": 11,
}

var etherTypes = map[string]uint64{
	"ipv4": 0x0800, "arp": 0x0806, "wol": 0x0842, "rarp": 0x8035, "ipv6": 0x86dd,
	"atalk": 0x809b, "aarp": 0x80f3, "ipx_a": 0x8137, "ipx_b": 0x8138,
}

var protocols = map[string]uint64{
	"icmp": 1, "icmp4": 1, "icmpv4": 1, "igmp": 2, "ipip": 4, "tcp": 6, "egp": 8, "igp": 9, "udp": 17, "rdp": 27,
	"esp": 50, "ah": 51, "icmp6": 58, "icmpv6": 58, "l2tp": 115, "sctp": 132, "udplite": 136,
}

// match is how a keyword is compiled: how many arguments it has and the keys of its
// JSON form (chapter 04 §9) that follow from them.
type match struct {
	args int
	keys func(c *compiler, name string, args []word) (map[string]any, error)
}

var matches map[string]match

func init() {
	plain := func(typ, key string, most uint64, names map[string]uint64) match {
		return match{1, func(_ *compiler, _ string, a []word) (map[string]any, error) {
			v, ok := names[a[0].lower()]
			if !ok {
				if v, ok = number(a[0].text, most); !ok {
					return nil, a[0].fail("%q is neither a number up to %d nor a name known here", a[0].text, most)
				}
			}
			return map[string]any{"type": typ, key: v}, nil
		}}
	}
	span := func(typ string) match {
		return match{1, func(_ *compiler, _ string, a []word) (map[string]any, error) {
			from, to, err := a[0].span(math.MaxUint16)
			return map[string]any{"type": typ, "start": from, "end": to}, err
		}}
	}
	node := func(typ string) match {
		return match{1, func(_ *compiler, _ string, a []word) (map[string]any, error) {
			x, err := a[0].address()
			return map[string]any{"type": typ, "zt": x}, err
		}}
	}
	text := func(typ, key string) match {
		return match{1, func(_ *compiler, _ string, a []word) (map[string]any, error) {
			return map[string]any{"type": typ, key: a[0].text}, nil
		}}
	}
	ip := func(four, six string) match {
		return match{1, func(_ *compiler, _ string, a []word) (map[string]any, error) {
			p, err := netip.ParsePrefix(a[0].text)
			if err != nil {
				return nil, a[0].fail("%q: give ADDRESS/BITS", a[0].text)
			}
			typ := six
			if p.Addr().Is4() {
				typ = four
			}
			return map[string]any{"type": typ, "ip": p.String()}, nil
		}}
	}
	tag := func(typ string) match {
		return match{2, func(c *compiler, _ string, a []word) (map[string]any, error) {
			t := c.tags[a[0].lower()]
			var id uint32
			if t != nil {
				id = t.ID
			} else if v, ok := number(a[0].text, 1<<32-1); ok {
				id = uint32(v)
			} else {
				return nil, a[0].fail("%q is neither a tag nor a number", a[0].text)
			}
			v, ok := t.value(a[1].text)
			if !ok {
				return nil, a[1].fail("%q is no value of tag %s", a[1].text, a[0].text)
			}
			return map[string]any{"type": typ, "id": id, "value": v}, nil
		}}
	}
	matches = map[string]match{
		"ztsrc": node("MATCH_SOURCE_ZEROTIER_ADDRESS"), "ztdest": node("MATCH_DEST_ZEROTIER_ADDRESS"),
		"vlan": plain("MATCH_VLAN_ID", "vlanId", 65535, nil), "vlanpcp": plain("MATCH_VLAN_PCP", "vlanPcp", 255, nil),
		"vlandei":    plain("MATCH_VLAN_DEI", "vlanDei", 255, nil),
		"ethertype":  plain("MATCH_ETHERTYPE", "etherType", 65535, etherTypes),
		"ipprotocol": plain("MATCH_IP_PROTOCOL", "ipProtocol", 255, protocols),
		"macsrc":     text("MATCH_MAC_SOURCE", "mac"), "macdest": text("MATCH_MAC_DEST", "mac"),
		"ipsrc": ip("MATCH_IPV4_SOURCE", "MATCH_IPV6_SOURCE"), "ipdest": ip("MATCH_IPV4_DEST", "MATCH_IPV6_DEST"),
		"sport": span("MATCH_IP_SOURCE_PORT_RANGE"), "dport": span("MATCH_IP_DEST_PORT_RANGE"), "framesize": span("MATCH_FRAME_SIZE_RANGE"),
		"iptos": {2, iptos}, "icmp": {2, icmp}, "chr": {1, chr}, "random": {1, random},
		"tand": tag("MATCH_TAGS_BITWISE_AND"), "tor": tag("MATCH_TAGS_BITWISE_OR"), "txor": tag("MATCH_TAGS_BITWISE_XOR"),
		"tdiff": tag("MATCH_TAGS_DIFFERENCE"), "teq": tag("MATCH_TAGS_EQUAL"),
		"tseq": tag("MATCH_TAG_SENDER"), "treq": tag("MATCH_TAG_RECEIVER"),
	}
}

// number reads a decimal or 0x number up to most.
func number(s string, most uint64) (uint64, bool) {
	base := 10
	if rest, ok := strings.CutPrefix(strings.ToLower(s), "0x"); ok {
		s, base = rest, 16
	}
	v, err := strconv.ParseUint(s, base, 64)
	return v, err == nil && v <= most
}

// span reads N or N-M.
func (w word) span(most uint64) (from, to uint64, err error) {
	a, b, ok := strings.Cut(w.text, "-")
	if !ok {
		b = a
	}
	from, ok1 := number(a, most)
	to, ok2 := number(b, most)
	if !ok1 || !ok2 || to < from {
		return 0, 0, w.fail("%q: give a number up to %d or a range of two", w.text, most)
	}
	return from, to, nil
}

func (w word) address() (string, error) {
	a, err := identity.ParseAddress(w.lower())
	if err != nil {
		return "", w.fail("%q: give a node's address, 10 hexadecimal digits", w.text)
	}
	return a.String(), nil
}

func iptos(_ *compiler, _ string, a []word) (map[string]any, error) {
	mask, ok := number(a[0].text, 255)
	if !ok {
		return nil, a[0].fail("mask %q: give a number from 0 to 255", a[0].text)
	}
	from, to, err := a[1].span(255)
	return map[string]any{"type": "MATCH_IP_TOS", "mask": mask, "start": from, "end": to}, err
}

func icmp(_ *compiler, _ string, a []word) (map[string]any, error) {
	typ, ok := number(a[0].text, 255)
	if !ok {
		return nil, a[0].fail("ICMP type %q: give a number from 0 to 255", a[0].text)
	}
	out := map[string]any{"type": "MATCH_ICMP", "icmpType": typ}
	if a[1].text == "-1" {
		return out, nil
	}
	code, ok := number(a[1].text, 255)
	if !ok {
		return nil, a[1].fail("ICMP code %q: give a number from 0 to 255, or -1 for any", a[1].text)
	}
	out["icmpCode"] = code
	return out, nil
}

func chr(_ *compiler, _ string, a []word) (map[string]any, error) {
	var mask uint64
	for _, name := range strings.Split(a[0].lower(), ",") {
		if name == "" {
			continue
		}
		bit, ok := characteristics[name]
		if !ok {
			n, ok := number(name, 63)
			if !ok {
				return nil, a[0].fail("%q is neither a characteristic nor a bit from 0 to 63", name)
			}
			bit = uint(n)
		}
		mask |= 1 << bit
	}
	return map[string]any{"type": "MATCH_CHARACTERISTICS", "mask": strconv.FormatUint(mask, 16)}, nil
}

func random(_ *compiler, _ string, a []word) (map[string]any, error) {
	p, err := strconv.ParseFloat(a[0].text, 64)
	if err != nil || !(p >= 0 && p <= 1) {
		return nil, a[0].fail("probability %q: give a number from 0 to 1", a[0].text)
	}
	return map[string]any{"type": "MATCH_RANDOM", "probability": uint64(p * math.MaxUint32)}, nil
}

// render appends the rules of statements; params are a macro's.
func (c *compiler) render(out []vl2.Rule, list []statement, params map[string]word, most, depth int) ([]vl2.Rule, error) {
	for _, s := range list {
		if c.steps++; c.steps > maxSteps {
			return nil, s.head.fail("macros unfold to more than %d blocks", maxSteps)
		}
		var err error
		if s.head.lower() == "include" {
			out, err = c.include(out, s, params, most, depth)
		} else {
			out, err = c.action(out, s, params)
		}
		if err != nil {
			return nil, err
		}
		if len(out) > most {
			return nil, s.head.fail("more than %d rules", most)
		}
	}
	return out, nil
}

func (c *compiler) include(out []vl2.Rule, s statement, params map[string]word, most, depth int) ([]vl2.Rule, error) {
	name, args, err := s.args[0].call()
	if err != nil {
		return nil, err
	}
	m := c.macros[name.lower()]
	switch {
	case m == nil:
		return nil, name.fail("there is no macro %s", name.text)
	case depth >= maxDepth:
		return nil, name.fail("macros include each other more than %d deep", maxDepth)
	case len(args) != len(m.params):
		return nil, name.fail("macro %s takes %d arguments, not %d", name.text, len(m.params), len(args))
	}
	inner := make(map[string]word, len(args))
	for i, a := range args {
		if inner[m.params[i]], err = a.resolve(params); err != nil {
			return nil, err
		}
	}
	return c.render(out, m.body, inner, most, depth+1)
}

// resolve replaces a parameter by its value.
func (w word) resolve(params map[string]word) (word, error) {
	if !strings.HasPrefix(w.text, "$") {
		return w, nil
	}
	v, ok := params[w.lower()]
	if !ok {
		return w, w.fail("%s is no parameter here", w.text)
	}
	return word{v.text, w.line, w.col}, nil
}

// action appends the matches of a block and then its action.
func (c *compiler) action(out []vl2.Rule, s statement, params map[string]word) ([]vl2.Rule, error) {
	out, err := c.matches(out, s.body, params)
	if err != nil {
		return nil, err
	}
	args := make([]word, len(s.args))
	for i, a := range s.args {
		if args[i], err = a.resolve(params); err != nil {
			return nil, err
		}
	}
	name := s.head.lower()
	keys := map[string]any{"type": "ACTION_" + strings.ToUpper(name)}
	if len(args) > 0 {
		if keys["address"], err = args[len(args)-1].address(); err != nil {
			return nil, err
		}
	}
	if len(args) == 2 {
		length, ok := uint64(0), args[0].text == "-1"
		if !ok {
			if length, ok = number(args[0].text, math.MaxUint16); !ok {
				return nil, args[0].fail("%s %q: give the most bytes to copy, or 0 for all", name, args[0].text)
			}
		}
		keys["length"] = length
	}
	r, err := rule(s.head, keys)
	return append(out, r), err
}

func (c *compiler) matches(out []vl2.Rule, body []word, params map[string]word) ([]vl2.Rule, error) {
	not, or := false, false
	for len(body) > 0 {
		w := body[0]
		body = body[1:]
		switch name := w.lower(); name {
		case "and":
		case "not":
			not = true
		case "or":
			or = true
		default:
			m, ok := matches[name]
			if !ok {
				return nil, w.fail("%q is no match", w.text)
			}
			if len(body) < m.args {
				return nil, w.fail("%s needs %d arguments", name, m.args)
			}
			args := make([]word, m.args)
			for i := range args {
				var err error
				if args[i], err = body[i].resolve(params); err != nil {
					return nil, err
				}
			}
			body = body[m.args:]
			keys, err := m.keys(c, name, args)
			if err != nil {
				return nil, err
			}
			keys["not"], keys["or"] = not, or
			r, err := rule(w, keys)
			if err != nil {
				return nil, err
			}
			out = append(out, r)
			not, or = false, false
			continue
		}
		if len(body) == 0 {
			return nil, w.fail("a match must follow %s", w.text)
		}
	}
	return out, nil
}

// rule encodes the JSON form.
func rule(at word, keys map[string]any) (r vl2.Rule, err error) {
	b, err := json.Marshal(keys)
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err != nil {
		return r, at.fail("%v", err)
	}
	return r, nil
}
