package offload

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Merger puts TCP segments or UDP datagrams of one flow that follow each other
// into one large packet, the reverse of [Segmenter]: one write instead of dozens,
// and one pass through the kernel. Packets of other flows may lie between them; the
// order within a flow is kept. It belongs to one goroutine.
type Merger struct {
	Link  int                  // length of the link header
	UDP   bool                 // the kernel takes merged datagrams (Linux 6.2)
	Write func(parts [][]byte) // one packet, behind its virtio_net_hdr; parts isn't kept

	groups []mergeGroup
	head   [HeaderLen]byte
	alone  [2][]byte
}

// mergeGroup is a packet that grows.
type mergeGroup struct {
	packet           // the first one
	parts   [][]byte // all of the first one behind a place for the virtio_net_hdr, payloads of the others
	size    int      // payload of all but perhaps the last one
	payload int
	next    uint32 // sequence number
	closed  bool   // nothing may follow: short packet or PSH
}

const (
	// maxMerged flows grow at the same time; further ones are written at once.
	maxMerged = 16
	// MaxParts is the most that the kernel takes at once of datagrams (UDP_MAX_SEGMENTS),
	// and far below what it takes of anything (IOV_MAX).
	MaxParts = 64
)

// Add takes a packet with its link header, which has to stay valid until Flush.
// Its headers may be changed.
func (m *Merger) Add(b []byte) {
	p, ok := locate(b, m.Link)
	if !ok || p.protocol == unix.IPPROTO_UDP && !m.UDP {
		m.plain(b)
		return
	}
	i := m.find(&p)
	payload := len(b) - p.head
	// Only plain data is merged. The kernel trusts the checksum of what we merge, so
	// it has to be right.
	data, push := payload > 0, false
	if p.protocol == unix.IPPROTO_TCP {
		flags := b[p.l4+13]
		push = flags&tcpPSH != 0
		data = data && flags&^tcpPSH == tcpACK
	}
	data = data && p.valid()
	if i >= 0 {
		if g := &m.groups[i]; data && g.takes(&p) {
			g.parts = append(g.parts, b[p.head:])
			g.payload += payload
			g.next += uint32(payload)
			g.closed = payload < g.size || push || len(g.parts) > MaxParts
			if push {
				g.b[g.l4+13] |= tcpPSH
			}
			return
		}
		m.emit(&m.groups[i])
		last := len(m.groups) - 1
		m.groups[i], m.groups[last] = m.groups[last], m.groups[i] // both keep their own memory
		m.groups = m.groups[:last]
	}
	if !data || push || len(m.groups) == maxMerged {
		m.plain(b)
		return
	}
	if len(m.groups) < cap(m.groups) {
		m.groups = m.groups[:len(m.groups)+1]
	} else {
		m.groups = append(m.groups, mergeGroup{})
	}
	g := &m.groups[len(m.groups)-1]
	*g = mergeGroup{packet: p, parts: append(g.parts[:0], m.head[:], b), size: payload, payload: payload}
	if p.protocol == unix.IPPROTO_TCP {
		g.next = binary.BigEndian.Uint32(b[p.l4+4:]) + uint32(payload)
	}
}

// find returns the group of the flow of a packet, -1 if there is none.
func (m *Merger) find(p *packet) int {
	for i := range m.groups {
		g := &m.groups[i]
		if g.l4 == p.l4 && g.protocol == p.protocol && string(g.b[g.l4:g.l4+4]) == string(p.b[p.l4:p.l4+4]) &&
			string(g.b[:g.ip]) == string(p.b[:p.ip]) && string(g.addresses()) == string(p.addresses()) {
			return i
		}
	}
	return -1
}

// takes reports whether a data packet of the same flow continues the group.
func (g *mergeGroup) takes(p *packet) bool {
	payload := len(p.b) - p.head
	if g.closed || p.head != g.head || payload > g.size || g.head+g.payload+payload-g.ip > 65535 {
		return false
	}
	a, b := g.b, p.b
	if g.protocol == unix.IPPROTO_TCP {
		at := g.l4
		// Sequence, then acknowledgement and header length, window, urgent pointer and options.
		if binary.BigEndian.Uint32(b[at+4:]) != g.next || string(a[at+8:at+13]) != string(b[at+8:at+13]) ||
			string(a[at+14:at+16]) != string(b[at+14:at+16]) || string(a[at+18:g.head]) != string(b[at+18:g.head]) {
			return false
		}
	}
	a, b = a[g.ip:], b[g.ip:]
	if g.v6() { // class and flow label, hop limit
		return string(a[:4]) == string(b[:4]) && a[7] == b[7]
	}
	// Type of service, don't fragment, time to live.
	return a[1] == b[1] && a[6] == b[6] && a[8] == b[8]
}

// Flush writes what has grown.
func (m *Merger) Flush() {
	for i := range m.groups {
		m.emit(&m.groups[i])
	}
	m.groups = m.groups[:0]
}

func (m *Merger) plain(b []byte) {
	m.head = [HeaderLen]byte{}
	m.alone = [2][]byte{m.head[:], b}
	m.Write(m.alone[:])
	m.alone[1] = nil
}

func (m *Merger) emit(g *mergeGroup) {
	m.head = [HeaderLen]byte{}
	if len(g.parts) > 2 {
		m.describe(g)
	}
	m.Write(g.parts)
	clear(g.parts)
}

// describe makes the headers those of the large packet.
func (m *Merger) describe(g *mergeGroup) {
	length := g.head + g.payload
	g.setLength(length - g.ip)
	// The kernel completes the checksum from the sum of the pseudo-header.
	putSum(g.checksum(), ^fold(g.pseudo(length-g.l4)))
	kind, field := byte(vnetUDP), 6
	if g.protocol == unix.IPPROTO_TCP {
		kind, field = vnetTCP4, 16
		if g.v6() {
			kind = vnetTCP6
		}
	}
	h := &m.head
	h[0], h[1] = vnetNeedsChecksum, kind
	binary.NativeEndian.PutUint16(h[2:], uint16(g.head))
	binary.NativeEndian.PutUint16(h[4:], uint16(g.size))
	binary.NativeEndian.PutUint16(h[6:], uint16(g.l4))
	binary.NativeEndian.PutUint16(h[8:], uint16(field))
}
