package vl2

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"ztgate/zerotier/identity"
)

// jsonTypes are the names of rule types in the controller's JSON (chapter 04 §9).
var jsonTypes = map[uint8]string{
	ActionDrop: "ACTION_DROP", ActionAccept: "ACTION_ACCEPT", ActionTee: "ACTION_TEE", ActionWatch: "ACTION_WATCH",
	ActionRedirect: "ACTION_REDIRECT", ActionBreak: "ACTION_BREAK", ActionPriority: "ACTION_PRIORITY",
	MatchSourceAddress: "MATCH_SOURCE_ZEROTIER_ADDRESS", MatchDestinationAddress: "MATCH_DEST_ZEROTIER_ADDRESS",
	MatchVLANID: "MATCH_VLAN_ID", MatchVLANPCP: "MATCH_VLAN_PCP", MatchVLANDEI: "MATCH_VLAN_DEI",
	MatchSourceMAC: "MATCH_MAC_SOURCE", MatchDestinationMAC: "MATCH_MAC_DEST",
	MatchIPv4Source: "MATCH_IPV4_SOURCE", MatchIPv4Destination: "MATCH_IPV4_DEST",
	MatchIPv6Source: "MATCH_IPV6_SOURCE", MatchIPv6Destination: "MATCH_IPV6_DEST",
	MatchIPTOS: "MATCH_IP_TOS", MatchIPProtocol: "MATCH_IP_PROTOCOL", MatchEtherType: "MATCH_ETHERTYPE", MatchICMP: "MATCH_ICMP",
	MatchSourcePort: "MATCH_IP_SOURCE_PORT_RANGE", MatchDestinationPort: "MATCH_IP_DEST_PORT_RANGE",
	MatchCharacteristics: "MATCH_CHARACTERISTICS", MatchFrameSize: "MATCH_FRAME_SIZE_RANGE", MatchRandom: "MATCH_RANDOM",
	MatchTagsDifference: "MATCH_TAGS_DIFFERENCE", MatchTagsAnd: "MATCH_TAGS_BITWISE_AND", MatchTagsOr: "MATCH_TAGS_BITWISE_OR",
	MatchTagsXor: "MATCH_TAGS_BITWISE_XOR", MatchTagsEqual: "MATCH_TAGS_EQUAL", MatchTagSender: "MATCH_TAG_SENDER",
	MatchTagReceiver: "MATCH_TAG_RECEIVER", MatchIntegerRange: "INTEGER_RANGE",
}

func jsonType(name string) (uint8, bool) {
	for typ, n := range jsonTypes {
		if n == name {
			return typ, true
		}
	}
	return 0, false
}

// number is an integer in JSON: a number, or text in hexadecimal.
type number uint64

func (n *number) UnmarshalJSON(b []byte) error {
	base := 10
	s := string(b)
	if len(b) > 1 && b[0] == '"' {
		base, s = 16, strings.TrimPrefix(s[1:len(s)-1], "0x")
	}
	v, err := strconv.ParseUint(s, base, 64)
	if err != nil {
		return fmt.Errorf("rule: number %s: %w", b, ErrMalformed)
	}
	*n = number(v)
	return nil
}

// ruleJSON has the keys of all types. A nil pointer is an absent key.
type ruleJSON struct {
	Type string `json:"type"`
	Not  *bool  `json:"not,omitempty"`
	Or   *bool  `json:"or,omitempty"`

	Address     *string `json:"address,omitempty"`
	Flags       *number `json:"flags,omitempty"`
	Length      *number `json:"length,omitempty"`
	ZT          *string `json:"zt,omitempty"`
	VLANID      *number `json:"vlanId,omitempty"`
	VLANPCP     *number `json:"vlanPcp,omitempty"`
	VLANDEI     *number `json:"vlanDei,omitempty"`
	MAC         *string `json:"mac,omitempty"`
	IP          *string `json:"ip,omitempty"`
	Mask        *number `json:"mask,omitempty"`
	Start       *number `json:"start,omitempty"`
	End         *number `json:"end,omitempty"`
	IPProtocol  *number `json:"ipProtocol,omitempty"`
	EtherType   *number `json:"etherType,omitempty"`
	ICMPType    *number `json:"icmpType,omitempty"`
	ICMPCode    *number `json:"icmpCode,omitempty"`
	Probability *number `json:"probability,omitempty"`
	ID          *number `json:"id,omitempty"`
	Value       *number `json:"value,omitempty"`
	Index       *number `json:"idx,omitempty"`
	Little      *bool   `json:"little,omitempty"`
	Bits        *number `json:"bits,omitempty"`
}

// fieldWriter appends numbers that must fit.
type fieldWriter struct {
	b   []byte
	err error
}

func (w *fieldWriter) fail(what string) {
	if w.err == nil {
		w.err = fmt.Errorf("%w: %s", ErrMalformed, what)
	}
}

// num appends a number of some bytes; absent is 0.
func (w *fieldWriter) num(v *number, bytes int) {
	var n uint64
	if v != nil {
		n = uint64(*v)
	}
	if bytes < 8 && n>>(8*bytes) != 0 {
		w.fail(fmt.Sprintf("%d is too large", n))
	}
	for i := bytes - 1; i >= 0; i-- {
		w.b = append(w.b, byte(n>>(8*i)))
	}
}

func (w *fieldWriter) address(s *string) (a identity.Address) {
	if s == nil {
		w.fail("no address")
		return 0
	}
	a, err := identity.ParseAddress(*s)
	if err != nil {
		w.fail(err.Error())
	}
	return a
}

// span appends start and end, which is start if absent.
func (w *fieldWriter) span(j *ruleJSON, bytes int) {
	end := j.End
	if end == nil {
		end = j.Start
	}
	w.num(j.Start, bytes)
	w.num(end, bytes)
}

func (w *fieldWriter) prefix(s *string, six bool) {
	if s == nil {
		w.fail("no ip")
		return
	}
	addr, bits, ok := strings.Cut(*s, "/")
	a, err := netip.ParseAddr(addr)
	n := uint64(a.BitLen())
	if ok && err == nil {
		n, err = strconv.ParseUint(bits, 10, 16)
	}
	if err != nil || a.Is4() == six || a.Zone() != "" {
		w.fail("ip " + *s)
		return
	}
	w.b = append(append(w.b, a.AsSlice()...), byte(min(n, uint64(a.BitLen())))) // chapter 04 §9: bits are cut
}

func (w *fieldWriter) mac(s *string) {
	if s == nil {
		w.fail("no mac")
		return
	}
	b, err := hex.DecodeString(strings.NewReplacer(":", "", "-", "").Replace(*s))
	if err != nil || len(b) != 6 {
		w.fail("mac " + *s)
	}
	w.b = append(w.b, b...)
}

// UnmarshalJSON reads the controller's form (chapter 04 §9). Unlike the reference it
// refuses what it can't encode: a match left out would turn "drop if A and B" into
// "drop if A".
func (r *Rule) UnmarshalJSON(b []byte) error {
	var j ruleJSON
	d := json.NewDecoder(bytes.NewReader(b))
	if err := d.Decode(&j); err != nil {
		return fmt.Errorf("rule: %w", err)
	}
	typ, ok := jsonType(j.Type)
	if !ok {
		return fmt.Errorf("rule: %w: type %q", ErrMalformed, j.Type)
	}
	var w fieldWriter
	w.write(typ, &j)
	if w.err != nil {
		return fmt.Errorf("rule %s: %w", j.Type, w.err)
	}
	*r = Rule{Type: typ, Field: w.b}
	if typ > lastAction {
		r.Not, r.Or = j.Not != nil && *j.Not, j.Or != nil && *j.Or
	}
	return nil
}

func (w *fieldWriter) write(typ uint8, j *ruleJSON) {
	switch typ {
	case ActionTee, ActionWatch, ActionRedirect:
		w.b = be.AppendUint64(w.b, uint64(w.address(j.Address)))
		w.num(j.Flags, 4)
		w.num(j.Length, 2)
	case MatchSourceAddress, MatchDestinationAddress:
		w.b = w.address(j.ZT).Append(w.b)
	case MatchVLANID:
		w.num(j.VLANID, 2)
	case MatchVLANPCP:
		w.num(j.VLANPCP, 1)
	case MatchVLANDEI:
		w.num(j.VLANDEI, 1)
	case MatchSourceMAC, MatchDestinationMAC:
		w.mac(j.MAC)
	case MatchIPv4Source, MatchIPv4Destination:
		w.prefix(j.IP, false)
	case MatchIPv6Source, MatchIPv6Destination:
		w.prefix(j.IP, true)
	case MatchIPTOS:
		w.num(j.Mask, 1)
		w.span(j, 1)
	case MatchIPProtocol:
		w.num(j.IPProtocol, 1)
	case MatchEtherType:
		w.num(j.EtherType, 2)
	case MatchICMP:
		w.num(j.ICMPType, 1)
		w.num(j.ICMPCode, 1)
		flags := byte(0)
		if j.ICMPCode != nil {
			flags = 1
		}
		w.b = append(w.b, flags)
	case MatchSourcePort, MatchDestinationPort, MatchFrameSize:
		w.span(j, 2)
	case MatchCharacteristics:
		w.num(j.Mask, 8)
	case MatchRandom:
		w.num(j.Probability, 4)
	case MatchTagsDifference, MatchTagsAnd, MatchTagsOr, MatchTagsXor, MatchTagsEqual, MatchTagSender, MatchTagReceiver:
		w.num(j.ID, 4)
		w.num(j.Value, 4)
	case MatchIntegerRange:
		w.span(j, 8)
		if be.Uint64(w.b[8:])-be.Uint64(w.b) > 1<<32-1 {
			w.fail("range wider than 32 bits") // the wire form can't say it (chapter 03 §6.2)
		}
		w.num(j.Index, 2)
		if j.Bits == nil || *j.Bits < 1 || *j.Bits > 64 {
			w.fail("bits outside 1 to 64")
			return
		}
		format := byte(*j.Bits - 1)
		if j.Little != nil && *j.Little {
			format |= 0x80
		}
		w.b = append(w.b, format)
	}
}

// MarshalJSON writes the controller's form (chapter 04 §9).
func (r Rule) MarshalJSON() ([]byte, error) {
	name, ok := jsonTypes[r.Type]
	if !ok || len(r.Field) < fieldLen(r.Type) {
		return nil, fmt.Errorf("rule: %w: type %d has no JSON form", ErrMalformed, r.Type)
	}
	out := []byte(`{"type":"` + name + `"`)
	put := func(key string, v any) {
		out = fmt.Appendf(out, `,"%s":%v`, key, v)
	}
	text := func(key, v string) { put(key, strconv.Quote(v)) }
	v := r.Field
	switch r.Type {
	case ActionTee, ActionWatch, ActionRedirect:
		text("address", forwardTarget(&r).String())
		put("flags", be.Uint32(v[8:]))
		if r.Type != ActionRedirect {
			put("length", be.Uint16(v[12:]))
		}
	case MatchSourceAddress, MatchDestinationAddress:
		text("zt", identity.AddressFromBytes(v).String())
	case MatchVLANID:
		put("vlanId", be.Uint16(v))
	case MatchVLANPCP:
		put("vlanPcp", v[0])
	case MatchVLANDEI:
		put("vlanDei", v[0])
	case MatchSourceMAC, MatchDestinationMAC:
		text("mac", MAC(v[:6]).String())
	case MatchIPv4Source, MatchIPv4Destination:
		text("ip", netip.PrefixFrom(netip.AddrFrom4([4]byte(v[:4])), min(int(v[4]), 32)).String())
	case MatchIPv6Source, MatchIPv6Destination:
		text("ip", netip.PrefixFrom(netip.AddrFrom16([16]byte(v[:16])), min(int(v[16]), 128)).String())
	case MatchIPTOS:
		put("mask", v[0])
		put("start", v[1])
		put("end", v[2])
	case MatchIPProtocol:
		put("ipProtocol", v[0])
	case MatchEtherType:
		put("etherType", be.Uint16(v))
	case MatchICMP:
		put("icmpType", v[0])
		if v[2]&1 != 0 {
			put("icmpCode", v[1])
		} else {
			put("icmpCode", "null")
		}
	case MatchSourcePort, MatchDestinationPort, MatchFrameSize:
		put("start", be.Uint16(v))
		put("end", be.Uint16(v[2:]))
	case MatchCharacteristics:
		text("mask", fmt.Sprintf("%016x", be.Uint64(v)))
	case MatchRandom:
		put("probability", be.Uint32(v))
	case MatchTagsDifference, MatchTagsAnd, MatchTagsOr, MatchTagsXor, MatchTagsEqual, MatchTagSender, MatchTagReceiver:
		put("id", be.Uint32(v))
		put("value", be.Uint32(v[4:]))
	case MatchIntegerRange:
		text("start", fmt.Sprintf("%016x", be.Uint64(v)))
		text("end", fmt.Sprintf("%016x", be.Uint64(v[8:])))
		put("idx", be.Uint16(v[16:]))
		put("little", v[18]&0x80 != 0)
		put("bits", v[18]&63+1)
	}
	if r.Type > lastAction {
		put("not", r.Not)
		put("or", r.Or)
	}
	return append(out, '}'), nil
}
