package router

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// merger puts TCP segments of one flow that follow each other into one large
// frame, the reverse of [segment]: one write instead of dozens, and one pass
// through the kernel. Segments of other flows may lie between them; the order
// within a flow is kept. It belongs to one goroutine.
type merger struct {
	write  func(parts [][]byte) // one frame, behind its virtio_net_hdr
	groups []mergeGroup
	head   [vnetLen]byte
}

// mergeGroup is a frame that grows.
type mergeGroup struct {
	parts   [][]byte // whole first frame, payloads of the others
	tcp     int      // offset of the TCP header
	size    int      // payload of all segments but perhaps the last
	payload int
	next    uint32 // sequence number
	closed  bool   // nothing may follow: short segment or PSH
}

const (
	// maxMerged flows grow at the same time; further ones are written at once.
	maxMerged = 16
	tcpACK    = 0x10
)

// add takes a frame, which has to stay valid until flush.
func (m *merger) add(f []byte) {
	tcp, head, ok := locateTCP(f)
	if !ok {
		m.plain(f)
		return
	}
	i := m.find(f, tcp)
	payload := len(f) - head
	flags := f[tcp+13]
	// Only plain data is merged. The kernel trusts the checksum of what we merge, so
	// it has to be right.
	data := payload > 0 && flags&^tcpPSH == tcpACK && validTCP(f, tcp)
	if i >= 0 {
		if g := &m.groups[i]; data && g.takes(f, tcp, head) {
			g.parts = append(g.parts, f[head:])
			g.payload += payload
			g.next += uint32(payload)
			g.closed = payload < g.size || flags&tcpPSH != 0
			g.parts[0][g.tcp+13] |= flags & tcpPSH
			return
		}
		m.emit(&m.groups[i])
		last := len(m.groups) - 1
		m.groups[i], m.groups[last] = m.groups[last], m.groups[i] // both keep their own memory
		m.groups = m.groups[:last]
	}
	if !data || flags&tcpPSH != 0 || len(m.groups) == maxMerged {
		m.plain(f)
		return
	}
	if len(m.groups) < cap(m.groups) {
		m.groups = m.groups[:len(m.groups)+1]
	} else {
		m.groups = append(m.groups, mergeGroup{})
	}
	g := &m.groups[len(m.groups)-1]
	*g = mergeGroup{parts: append(g.parts[:0], f), tcp: tcp, size: payload, payload: payload,
		next: binary.BigEndian.Uint32(f[tcp+4:]) + uint32(payload)}
}

// find returns the group of the flow of a frame, -1 if there is none.
func (m *merger) find(f []byte, tcp int) int {
	for i := range m.groups {
		g := &m.groups[i]
		if h := g.parts[0]; g.tcp == tcp && string(h[tcp:tcp+4]) == string(f[tcp:tcp+4]) && sameAddresses(h, f) {
			return i
		}
	}
	return -1
}

func sameAddresses(a, b []byte) bool {
	from, to := ethLen+12, ethLen+20
	if a[12] == 0x86 {
		from, to = ethLen+8, ethLen+40
	}
	return string(a[:14]) == string(b[:14]) && string(a[from:to]) == string(b[from:to])
}

// takes reports whether a data segment of the same flow continues the group.
func (g *mergeGroup) takes(f []byte, tcp, head int) bool {
	h, payload := g.parts[0], len(f)-head
	if g.closed || payload > g.size || binary.BigEndian.Uint32(f[tcp+4:]) != g.next ||
		head+g.payload+payload-ethLen > 65535 {
		return false
	}
	// Acknowledgement, header length, window, urgent pointer and options.
	if string(h[tcp+8:tcp+13]) != string(f[tcp+8:tcp+13]) || string(h[tcp+14:tcp+16]) != string(f[tcp+14:tcp+16]) ||
		string(h[tcp+18:head]) != string(f[tcp+18:head]) {
		return false
	}
	if h[12] == 0x86 { // class and flow label, hop limit
		return string(h[ethLen:ethLen+4]) == string(f[ethLen:ethLen+4]) && h[ethLen+7] == f[ethLen+7]
	}
	// Type of service, don't fragment, time to live.
	return h[ethLen+1] == f[ethLen+1] && h[ethLen+6] == f[ethLen+6] && h[ethLen+8] == f[ethLen+8]
}

// flush writes what has grown.
func (m *merger) flush() {
	for i := range m.groups {
		m.emit(&m.groups[i])
	}
	m.groups = m.groups[:0]
}

func (m *merger) plain(f []byte) {
	m.head = [vnetLen]byte{}
	m.write([][]byte{m.head[:], f})
}

func (m *merger) emit(g *mergeGroup) {
	if len(g.parts) == 1 {
		m.plain(g.parts[0])
		return
	}
	f := g.parts[0]
	ip, t := f[ethLen:], f[g.tcp:]
	head := g.tcp + int(t[12]>>4)*4
	length := head + g.payload - ethLen
	kind := byte(vnetTCP4)
	addresses := ip[12:20]
	if f[12] == 0x86 {
		kind, addresses = vnetTCP6, ip[8:40]
		binary.BigEndian.PutUint16(ip[4:], uint16(length-40))
	} else {
		binary.BigEndian.PutUint16(ip[2:], uint16(length))
		ip[10], ip[11] = 0, 0
		putChecksum(ip[10:], fold(sum(ip[:20], 0)))
	}
	// The kernel completes the checksum from the sum of the pseudo-header.
	pseudo := sum(addresses, unix.IPPROTO_TCP+uint64(length+ethLen-g.tcp))
	binary.BigEndian.PutUint16(t[16:], ^fold(pseudo))
	h := &m.head
	h[0], h[1] = vnetNeedsChecksum, kind
	binary.NativeEndian.PutUint16(h[2:], uint16(head))
	binary.NativeEndian.PutUint16(h[4:], uint16(g.size))
	binary.NativeEndian.PutUint16(h[6:], uint16(g.tcp))
	binary.NativeEndian.PutUint16(h[8:], 16)
	g.parts = append(g.parts, nil)
	copy(g.parts[1:], g.parts)
	g.parts[0] = h[:]
	m.write(g.parts)
}

// locateTCP finds the TCP header and the payload of a frame with an unfragmented
// IPv4 packet without options, or an IPv6 one without extension headers. Bytes
// behind the packet make it no such frame.
func locateTCP(f []byte) (tcp, head int, ok bool) {
	if len(f) < ethLen+40 {
		return 0, 0, false
	}
	ip := f[ethLen:]
	switch {
	case f[12] == 0x08 && f[13] == 0x00:
		if ip[0] != 0x45 || ip[9] != unix.IPPROTO_TCP || ip[6]&^0x40 != 0 || ip[7] != 0 ||
			int(binary.BigEndian.Uint16(ip[2:])) != len(ip) || fold(sum(ip[:20], 0)) != 0 {
			return 0, 0, false
		}
		tcp = ethLen + 20
	case f[12] == 0x86 && f[13] == 0xdd:
		if len(ip) < 60 || ip[0]>>4 != 6 || ip[6] != unix.IPPROTO_TCP || int(binary.BigEndian.Uint16(ip[4:])) != len(ip)-40 {
			return 0, 0, false
		}
		tcp = ethLen + 40
	default:
		return 0, 0, false
	}
	head = tcp + int(f[tcp+12]>>4)*4
	return tcp, head, head >= tcp+20 && head <= len(f)
}

func validTCP(f []byte, tcp int) bool {
	addresses := f[ethLen+12 : ethLen+20]
	if f[12] == 0x86 {
		addresses = f[ethLen+8 : ethLen+40]
	}
	return fold(sum(f[tcp:], sum(addresses, unix.IPPROTO_TCP+uint64(len(f)-tcp)))) == 0
}
