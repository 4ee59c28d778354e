package vl2

import (
	"fmt"

	"ztgate/zerotier/identity"
)

// Rule types (chapter 03 §6.2).
const (
	ActionDrop     = 0
	ActionAccept   = 1
	ActionTee      = 2
	ActionWatch    = 3
	ActionRedirect = 4
	ActionBreak    = 5
	ActionPriority = 6
	lastAction     = 15

	MatchSourceAddress      = 24
	MatchDestinationAddress = 25
	MatchVLANID             = 26
	MatchVLANPCP            = 27
	MatchVLANDEI            = 28
	MatchSourceMAC          = 29
	MatchDestinationMAC     = 30
	MatchIPv4Source         = 31
	MatchIPv4Destination    = 32
	MatchIPv6Source         = 33
	MatchIPv6Destination    = 34
	MatchIPTOS              = 35
	MatchIPProtocol         = 36
	MatchEtherType          = 37
	MatchICMP               = 38
	MatchSourcePort         = 39
	MatchDestinationPort    = 40
	MatchCharacteristics    = 41
	MatchFrameSize          = 42
	MatchRandom             = 43
	MatchTagsDifference     = 44
	MatchTagsAnd            = 45
	MatchTagsOr             = 46
	MatchTagsXor            = 47
	MatchTagsEqual          = 48
	MatchTagSender          = 49
	MatchTagReceiver        = 50
	MatchIntegerRange       = 51
)

const (
	ruleNot      = 0x80
	ruleOr       = 0x40
	ruleTypeMask = 0x3f
)

// Rule is one entry of a rules table: a match or an action. Field has at least the
// length that chapter 03 §6.2 lists for the type; [ParseRules] and the JSON form
// take care of that.
type Rule struct {
	Type    uint8
	Not, Or bool
	Field   []byte
}

// fieldLen is the length a known type needs, 0 for those without field.
func fieldLen(typ uint8) int {
	switch typ {
	case ActionTee, ActionWatch, ActionRedirect:
		return 14
	case MatchSourceAddress, MatchDestinationAddress, MatchIPv4Source, MatchIPv4Destination:
		return 5
	case MatchVLANID, MatchEtherType:
		return 2
	case MatchVLANPCP, MatchVLANDEI, MatchIPProtocol:
		return 1
	case MatchSourceMAC, MatchDestinationMAC:
		return 6
	case MatchIPv6Source, MatchIPv6Destination:
		return 17
	case MatchIPTOS, MatchICMP:
		return 3
	case MatchSourcePort, MatchDestinationPort, MatchFrameSize, MatchRandom:
		return 4
	case MatchCharacteristics, MatchTagsDifference, MatchTagsAnd, MatchTagsOr, MatchTagsXor, MatchTagsEqual, MatchTagSender, MatchTagReceiver:
		return 8
	case MatchIntegerRange:
		return 19
	}
	return 0
}

// ParseRules reads a table; entries beyond most are ignored. An entry of a known
// type that is too short is an error.
func ParseRules(b []byte, most int) ([]Rule, error) {
	var out []Rule
	b = append([]byte(nil), b...) // the fields lie next to each other
	for len(b) > 0 {
		if len(b) < 2 || len(b) < 2+int(b[1]) {
			return nil, fmt.Errorf("rule: %w: cut short", ErrMalformed)
		}
		typ, n := b[0]&ruleTypeMask, int(b[1])
		if n < fieldLen(typ) {
			return nil, fmt.Errorf("rule: %w: type %d with %d bytes", ErrMalformed, typ, n)
		}
		if len(out) < most {
			out = append(out, Rule{Type: typ, Not: b[0]&ruleNot != 0, Or: b[0]&ruleOr != 0, Field: b[2 : 2+n : 2+n]})
		}
		b = b[2+n:]
	}
	return out, nil
}

// AppendRules appends a table.
func AppendRules(b []byte, rules []Rule) []byte {
	for _, r := range rules {
		typ := r.Type
		if r.Not {
			typ |= ruleNot
		}
		if r.Or {
			typ |= ruleOr
		}
		b = append(append(b, typ, byte(len(r.Field))), r.Field...)
	}
	return b
}

// Verdict is the outcome of one table.
type Verdict uint8

// Verdicts (chapter 03 §6.4).
const (
	VerdictNoMatch Verdict = iota
	VerdictDrop
	VerdictRedirect
	VerdictAccept
	VerdictSuperAccept
)

// String returns the name used in the vectors.
func (v Verdict) String() string {
	return [...]string{"NO_MATCH", "DROP", "REDIRECT", "ACCEPT", "SUPER_ACCEPT"}[v]
}

// FrameInfo is a frame to be judged.
type FrameInfo struct {
	Inbound                   bool
	Source, Destination       identity.Address // destination 0 = unknown
	SourceMAC, DestinationMAC MAC
	EtherType                 uint16
	VLAN                      uint16
	Data                      []byte // Ethernet payload
}

// Copy is an order to copy a frame to somebody.
type Copy struct {
	To     identity.Address // 0 = none
	Length int
	Watch  bool
}

// Evaluation is one table's result.
type Evaluation struct {
	Verdict     Verdict
	Destination identity.Address // changed by REDIRECT
	Copy        Copy
}

// evaluator holds the state of one evaluation.
type evaluator struct {
	f           *FrameInfo
	own         *NetworkConfig
	other       *Membership // record of the other node, nil without
	skipDrop    bool
	superAccept bool

	walked6 bool // the rest describes the IPv6 payload
	ok6     bool
	proto6  byte
	pos6    int

	portsRead bool // the rest describes TCP, UDP and the like
	noPort    matchResult
	ports     [2]uint16
}

type matchResult uint8

const (
	isFalse matchResult = iota
	isTrue
	fixedFalse
	fixedTrue
)

func result(b bool) matchResult {
	if b {
		return isTrue
	}
	return isFalse
}

// Evaluate judges a frame by one table (chapter 03 §6.4). It allocates nothing.
func Evaluate(rules []Rule, f *FrameInfo, own *NetworkConfig, other *Membership) (ev Evaluation) {
	e := evaluator{f: f, own: own, other: other}
	ev.Destination = f.Destination
	matched := true
	for i := range rules {
		r := &rules[i]
		switch {
		case r.Type > lastAction:
			if matched || r.Or {
				matched = combine(r, matched, e.match(r))
			}
		case !matched:
			e.passOver(r)
			matched = true
		case e.act(r, &ev):
			return ev
		}
	}
	return ev
}

// combine joins the result of a match with that of those before it.
func combine(r *Rule, before bool, m matchResult) bool {
	hit := m == isTrue || m == fixedTrue
	if r.Not && m <= isTrue {
		hit = !hit
	}
	if r.Or {
		return before || hit
	}
	return hit
}

// act does what a rule orders whose matches hit; true ends the table.
func (e *evaluator) act(r *Rule, ev *Evaluation) (done bool) {
	switch r.Type {
	case ActionDrop:
		if e.skipDrop {
			e.skipDrop = false
			return false
		}
		ev.Verdict = VerdictDrop
	case ActionAccept:
		ev.Verdict = VerdictAccept
		if e.superAccept {
			ev.Verdict = VerdictSuperAccept
		}
	case ActionPriority:
		ev.Verdict = VerdictAccept
	case ActionBreak:
		ev.Verdict = VerdictNoMatch
	case ActionTee, ActionWatch, ActionRedirect:
		return e.forward(r, ev)
	default:
		return false
	}
	return true
}

// passOver notes an action whose matches did not hit: after one that copies or redirects
// inbound frames to us, ACCEPT is a super-accept.
func (e *evaluator) passOver(r *Rule) {
	if e.f.Inbound && (r.Type == ActionTee || r.Type == ActionWatch || r.Type == ActionRedirect) && forwardTarget(r) == e.own.Member {
		e.superAccept = true
	}
}

func forwardTarget(r *Rule) identity.Address {
	return identity.Address(be.Uint64(r.Field)) & (1<<40 - 1)
}

// forward acts on TEE, WATCH and REDIRECT; true ends the table.
func (e *evaluator) forward(r *Rule, ev *Evaluation) bool {
	x := forwardTarget(r)
	switch {
	case x == e.f.Source:
	case x == e.own.Member:
		if e.f.Inbound {
			ev.Verdict = VerdictSuperAccept
			return true
		}
	case x == ev.Destination:
	case r.Type == ActionRedirect:
		ev.Destination = x
		ev.Verdict = VerdictRedirect
		return true
	default:
		n := int(be.Uint16(r.Field[12:]))
		if n == 0 || n > len(e.f.Data) {
			n = len(e.f.Data)
		}
		ev.Copy = Copy{To: x, Length: n, Watch: r.Type == ActionWatch}
	}
	return false
}

func isV4(f *FrameInfo) bool { return f.EtherType == EtherTypeIPv4 && len(f.Data) >= 20 }
func isV6(f *FrameInfo) bool { return f.EtherType == EtherTypeIPv6 && len(f.Data) >= 40 }

// payload6 is [ipv6Payload] of the frame, walked once per evaluation: the chain of
// headers in a hostile frame may be long.
func (e *evaluator) payload6() (proto byte, pos int, ok bool) {
	if !e.walked6 {
		e.walked6 = true
		e.proto6, e.pos6, e.ok6 = ipv6Payload(e.f.Data)
	}
	return e.proto6, e.pos6, e.ok6
}

// ipv6Payload finds protocol and position of the IPv6 payload.
func ipv6Payload(d []byte) (proto byte, pos int, ok bool) {
	if len(d) < 40 {
		return 0, 0, false
	}
	proto, pos = d[6], 40
	for proto == 0 || proto == 43 || proto == 60 || proto == 135 {
		if pos+8 > len(d) {
			return 0, 0, false
		}
		proto, pos = d[pos], pos+int(d[pos+1])*8+8
	}
	return proto, pos, pos <= len(d)
}

// match evaluates one match (chapter 03 §6.3).
func (e *evaluator) match(r *Rule) matchResult {
	f, d, v := e.f, e.f.Data, r.Field
	switch r.Type {
	case MatchSourceAddress:
		return result(identity.AddressFromBytes(v) == f.Source)
	case MatchDestinationAddress:
		return result(identity.AddressFromBytes(v) == f.Destination)
	case MatchVLANID:
		return result(be.Uint16(v) == f.VLAN)
	case MatchVLANPCP, MatchVLANDEI:
		return result(v[0] == 0)
	case MatchSourceMAC:
		return result(MAC(v[:6]) == f.SourceMAC)
	case MatchDestinationMAC:
		return result(MAC(v[:6]) == f.DestinationMAC)
	case MatchIPv4Source, MatchIPv4Destination:
		if !isV4(f) {
			return fixedFalse
		}
		at := 12
		if r.Type == MatchIPv4Destination {
			at = 16
		}
		bits := min(uint(v[4]), 32)
		return result(be.Uint32(v)>>(32-bits) == be.Uint32(d[at:])>>(32-bits))
	case MatchIPv6Source, MatchIPv6Destination:
		if !isV6(f) {
			return fixedFalse
		}
		at := 8
		if r.Type == MatchIPv6Destination {
			at = 24
		}
		return result(matchPrefix6(d[at:at+16], v[:16], min(int(v[16]), 128)))
	case MatchIPTOS:
		var tos byte
		switch {
		case isV4(f):
			tos = d[1]
		case isV6(f):
			tos = d[0]<<4 | d[1]>>4
		default:
			return fixedFalse
		}
		x := tos & v[0]
		return result(v[1] <= x && x <= v[2])
	case MatchIPProtocol:
		if isV4(f) {
			return result(d[9] == v[0])
		}
		if f.EtherType == EtherTypeIPv6 {
			if proto, _, ok := e.payload6(); ok {
				return result(proto == v[0])
			}
		}
		return fixedFalse
	case MatchEtherType:
		return result(be.Uint16(v) == f.EtherType)
	case MatchICMP:
		return e.matchICMP(v)
	case MatchSourcePort, MatchDestinationPort:
		return e.matchPort(r.Type == MatchDestinationPort, be.Uint16(v), be.Uint16(v[2:]))
	case MatchCharacteristics:
		mask := be.Uint64(v)
		return result(e.characteristics(mask)&mask != 0)
	case MatchFrameSize:
		return result(int(be.Uint16(v)) <= len(d) && len(d) <= int(be.Uint16(v[2:])))
	case MatchRandom:
		return result(random32() <= be.Uint32(v))
	case MatchTagsDifference, MatchTagsAnd, MatchTagsOr, MatchTagsXor, MatchTagsEqual:
		return e.matchTags(r.Type, be.Uint32(v), be.Uint32(v[4:]))
	case MatchTagSender, MatchTagReceiver:
		return e.matchTag(r.Type == MatchTagSender, be.Uint32(v), be.Uint32(v[4:]))
	case MatchIntegerRange:
		low, high := be.Uint64(v), be.Uint64(v[8:])
		n := integerAt(d, int(be.Uint16(v[16:])), v[18])
		return result(low <= n && n <= low+(high-low)&0xffffffff)
	}
	return result(e.own.Flags&FlagUnknownMatches != 0)
}

// matchPrefix6 compares the masked address with the value as it stands.
func matchPrefix6(a, value []byte, bits int) bool {
	for i := range 16 {
		x := a[i]
		switch {
		case bits <= 8*i:
			x = 0
		case bits < 8*i+8:
			x &= 0xff << (8*i + 8 - bits)
		}
		if x != value[i] {
			return false
		}
	}
	return true
}

func (e *evaluator) matchICMP(v []byte) matchResult {
	f, d := e.f, e.f.Data
	pos := -1
	if isV4(f) {
		if h := int(d[0]&15) * 4; d[9] == 1 && len(d) >= h+2 {
			pos = h
		}
	} else if f.EtherType == EtherTypeIPv6 {
		if proto, p, ok := e.payload6(); ok && proto == 58 && len(d) >= p+2 {
			pos = p
		}
	}
	if pos < 0 || d[pos] != v[0] {
		return fixedFalse
	}
	if v[2]&1 != 0 {
		return result(d[pos+1] == v[1])
	}
	return fixedTrue
}

func hasPorts(proto byte) bool { return proto == 6 || proto == 17 || proto == 132 || proto == 136 }

// matchPort looks for the ports once per evaluation.
func (e *evaluator) matchPort(destination bool, low, high uint16) matchResult {
	if !e.portsRead {
		e.portsRead, e.noPort = true, e.readPorts()
	}
	if e.noPort != isTrue {
		return e.noPort
	}
	p := e.ports[0]
	if destination {
		p = e.ports[1]
	}
	return result(low <= p && p <= high && (p != 0 || e.f.EtherType == EtherTypeIPv4))
}

// readPorts finds the ports; otherwise it says what a match of ports yields.
func (e *evaluator) readPorts() matchResult {
	f, d := e.f, e.f.Data
	pos := 0
	switch {
	case isV4(f):
		if pos = int(d[0]&15) * 4; !hasPorts(d[9]) || len(d) <= pos+4 {
			return isFalse
		}
	case f.EtherType == EtherTypeIPv6:
		proto, at, ok := e.payload6()
		if !ok {
			return fixedFalse
		}
		if pos = at; !hasPorts(proto) || len(d) <= pos+4 {
			return isFalse
		}
	default:
		return fixedFalse
	}
	e.ports = [2]uint16{be.Uint16(d[pos:]), be.Uint16(d[pos+2:])}
	return isTrue
}

// Bits of the characteristics (chapter 03 §6.3).
const (
	CharInbound           = 1 << 63
	CharMulticast         = 1 << 62
	CharBroadcast         = 1 << 61
	CharSenderIPAuthentic = 1 << 60
	CharMACAuthentic      = 1 << 59

	charTCP = 0xfff // header flags
)

// characteristics returns the bits of the mask, perhaps others. Asking certificates
// is slow and only done if the mask wants to know.
func (e *evaluator) characteristics(mask uint64) (c uint64) {
	f, d := e.f, e.f.Data
	if f.Inbound {
		c |= CharInbound
	}
	if f.DestinationMAC.IsMulticast() {
		c |= CharMulticast
	}
	if f.DestinationMAC == BroadcastMAC {
		c |= CharBroadcast
	}
	if mask&CharMACAuthentic != 0 && e.ownsMAC(f.SourceMAC) {
		c |= CharMACAuthentic
	}
	if mask&CharSenderIPAuthentic != 0 && e.senderAuthentic() {
		c |= CharSenderIPAuthentic
	}
	if mask&charTCP == 0 {
		return c
	}
	if isV4(f) && d[9] == 6 {
		if h := int(d[0]&15) * 4; len(d) > h+13 {
			c |= uint64(d[h+13]) | uint64(d[h+12]&0x0f)<<8
		}
	} else if f.EtherType == EtherTypeIPv6 {
		if proto, pos, ok := e.payload6(); ok && proto == 6 && len(d) > pos+14 {
			c |= uint64(d[pos+13]) | uint64(d[pos+12]&0x0f)<<8
		}
	}
	return c
}

func (e *evaluator) ownsMAC(m MAC) bool {
	t := Thing{Type: ThingMAC}
	copy(t.Value[:], m[:])
	return e.owns(t)
}

// owns asks our own certificates outbound, the sender's inbound.
func (e *evaluator) owns(t Thing) bool {
	if e.f.Inbound {
		return e.other != nil && e.other.Owns(e.own, t)
	}
	for _, c := range e.own.COOs {
		for i := range c.Things {
			if c.Things[i] == t {
				return true
			}
		}
	}
	return false
}

func (e *evaluator) senderAuthentic() bool {
	f, d := e.f, e.f.Data
	var t Thing
	switch {
	case isV4(f):
		t.Type = ThingIPv4
		copy(t.Value[:], d[12:16])
	case isV6(f):
		t.Type = ThingIPv6
		copy(t.Value[:], d[8:24])
		if len(d) >= 64 && d[6] == 58 && d[40] == 135 {
			return true
		}
		if len(d) >= 64 && d[6] == 58 && d[40] == 136 {
			copy(t.Value[:], d[48:64])
		}
	case f.EtherType == EtherTypeARP && len(d) >= 28:
		t.Type = ThingIPv4
		copy(t.Value[:], d[14:18])
	default:
		return false
	}
	if e.owns(t) {
		return true
	}
	return f.Inbound && e.other != nil && t.Type == ThingIPv6 && impliedOwner(e.own, addrOf(t))
}

func (e *evaluator) ownTag(id uint32) (uint32, bool) {
	for _, t := range e.own.Tags {
		if t.ID == id {
			return t.Value, true
		}
	}
	return 0, false
}

func (e *evaluator) otherTag(id uint32) (uint32, bool) {
	if e.other == nil {
		return 0, false
	}
	return e.other.Tag(e.own, id)
}

func (e *evaluator) matchTags(typ uint8, id, value uint32) matchResult {
	a, ok := e.ownTag(id)
	if !ok {
		return fixedFalse
	}
	b, ok := e.otherTag(id)
	if !ok {
		if e.f.Inbound && !e.superAccept {
			return fixedFalse
		}
		e.skipDrop = true
		return fixedTrue
	}
	switch typ {
	case MatchTagsDifference:
		return result(max(a, b)-min(a, b) <= value)
	case MatchTagsAnd:
		return result(a&b == value)
	case MatchTagsOr:
		return result(a|b == value)
	case MatchTagsXor:
		return result(a^b == value)
	}
	return result(a == value && b == value)
}

func (e *evaluator) matchTag(sender bool, id, value uint32) matchResult {
	if e.superAccept {
		e.skipDrop = true
		return fixedTrue
	}
	if sender == e.f.Inbound { // the wanted side is the other node
		if v, ok := e.otherTag(id); ok {
			return result(v == value)
		}
		if sender {
			return fixedFalse
		}
		e.skipDrop = true
		return fixedTrue
	}
	if v, ok := e.ownTag(id); ok {
		return result(v == value)
	}
	return fixedFalse
}

// integerAt reads the number of an integer range match.
func integerAt(d []byte, index int, format byte) (n uint64) {
	bits := int(format&63) + 1
	size := (bits + 7) / 8
	little := format&0x80 != 0
	start := index
	if !little {
		start = index + 8 - size
	}
	if start+size > len(d) {
		return 0
	}
	for i := range size {
		if little {
			n |= uint64(d[start+i]) << (8 * i)
		} else {
			n = n<<8 | uint64(d[start+i])
		}
	}
	if little {
		return n >> (8*size - bits)
	}
	if bits < 64 {
		n &= 1<<bits - 1
	}
	return n
}
