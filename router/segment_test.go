package router

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"testing"
)

// tcpFrame builds an Ethernet frame with a TCP segment, as the kernel hands it
// over for segmentation: the checksum field holds the pseudo-header's sum.
func tcpFrame(v6 bool, payload []byte) (b []byte, tcp int) {
	tcp = 34
	if v6 {
		tcp = 54
	}
	b = make([]byte, tcp+32+len(payload))
	copy(b[tcp+32:], payload)
	if v6 {
		b[12], b[13] = 0x86, 0xdd
		b[14], b[20], b[21] = 0x60, 6, 64
		b[37], b[53] = 1, 2
		binary.BigEndian.PutUint16(b[18:], uint16(len(b)-54))
	} else {
		b[12], b[13], b[14], b[22], b[23] = 8, 0, 0x45, 64, 6
		copy(b[26:], []byte{10, 0, 0, 1, 10, 0, 0, 2})
		binary.BigEndian.PutUint16(b[16:], uint16(len(b)-14))
		binary.BigEndian.PutUint16(b[18:], 0xfffe)
	}
	binary.BigEndian.PutUint32(b[tcp+4:], 0xfffffff0)
	b[tcp+12], b[tcp+13] = 8<<4, 0x19 // 12 bytes of options; ACK PSH FIN
	return b, tcp
}

func vnet(flags, kind byte, size, start, offset int) []byte {
	h := make([]byte, vnetLen)
	h[0], h[1] = flags, kind
	binary.NativeEndian.PutUint16(h[4:], uint16(size))
	binary.NativeEndian.PutUint16(h[6:], uint16(start))
	binary.NativeEndian.PutUint16(h[8:], uint16(offset))
	return h
}

func cut(b []byte) ([][]byte, error) {
	var out [][]byte
	buf := make([]byte, maxFrame)
	err := segment(b, func() []byte { return buf }, func(n int) { out = append(out, slices.Clone(buf[:n])) })
	return out, err
}

// checkTCP verifies the checksums of a frame and returns its payload.
func checkTCP(t *testing.T, f []byte, tcp int) []byte {
	t.Helper()
	addresses := f[26:34]
	if tcp == 54 {
		addresses = f[22:54]
	} else if c := fold(sum(f[14:34], 0)); c != 0 {
		t.Errorf("IP checksum is off by %x", c)
	}
	if c := fold(sum(f[tcp:], sum(addresses, uint64(6+len(f)-tcp)))); c != 0 {
		t.Errorf("TCP checksum is off by %x", c)
	}
	return f[tcp+32:]
}

func TestSegmentTCP(t *testing.T) {
	payload := make([]byte, 3500)
	for i := range payload {
		payload[i] = byte(i * 7)
	}
	for _, v6 := range []bool{false, true} {
		frame, tcp := tcpFrame(v6, payload)
		kind := byte(vnetTCP4)
		if v6 {
			kind = vnetTCP6
		}
		got, err := cut(append(vnet(vnetNeedsChecksum, kind, 1000, tcp, 16), frame...))
		if err != nil || len(got) != 4 {
			t.Fatalf("v6 %v: %d frames, %v, want 4", v6, len(got), err)
		}
		var all []byte
		for i, f := range got {
			all = append(all, checkTCP(t, f, tcp)...)
			if seq := binary.BigEndian.Uint32(f[tcp+4:]); seq != 0xfffffff0+uint32(i*1000) {
				t.Errorf("frame %d has sequence number %x", i, seq)
			}
			if last := f[tcp+13] == 0x19; last != (i == 3) {
				t.Errorf("frame %d has flags %x", i, f[tcp+13])
			}
			if id := binary.BigEndian.Uint16(f[18:]); !v6 && id != uint16(0xfffe+i) {
				t.Errorf("frame %d has IP ID %x", i, id)
			}
		}
		if !bytes.Equal(all, payload) {
			t.Error("the payload differs")
		}
	}
}

func TestSegmentChecksum(t *testing.T) {
	frame, tcp := tcpFrame(false, []byte("odd"))
	binary.BigEndian.PutUint16(frame[tcp+16:], ^fold(sum(frame[26:34], uint64(6+len(frame)-tcp))))
	frame[24], frame[25] = 0, 0
	putChecksum(frame[24:], fold(sum(frame[14:34], 0)))
	got, err := cut(append(vnet(vnetNeedsChecksum, 0, 0, tcp, 16), frame...))
	if err != nil || len(got) != 1 {
		t.Fatal(len(got), err)
	}
	checkTCP(t, got[0], tcp)
}

func FuzzSegment(f *testing.F) {
	frame, tcp := tcpFrame(false, make([]byte, 3000))
	f.Add(append(vnet(1, vnetTCP4, 1000, tcp, 16), frame...))
	frame, tcp = tcpFrame(true, make([]byte, 3000))
	f.Add(append(vnet(1, vnetTCP6, 1000, tcp, 16), frame...))
	f.Add(append(vnet(1, 0, 0, tcp, 16), frame...))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) <= maxLarge {
			_, _ = cut(b)
		}
	})
}

// TestTAPTransfer sends real TCP through a TAP into a second one and back, each
// kernel side in a namespace of its own.
func TestTAPTransfer(t *testing.T) {
	type end struct {
		tap  *tap
		conn net.Conn
	}
	macs := [2]MAC{{2, 0, 0, 0, 0, 1}, {2, 0, 0, 0, 0, 2}}
	addrs := pfx("10.147.17.1/24", "10.147.17.2/24")
	var ends [2]end
	listening := make(chan net.Listener, 1)
	accepted := make(chan net.Conn, 1)
	// One namespace after the other, each on the test's thread.
	for i := range ends {
		inNamespace(t)
		p, err := openTAP(1, "ztmt1", macs[i], discard)
		if err != nil {
			t.Fatal(err)
		}
		ends[i].tap = p
		if err := p.link.up(2800); err != nil {
			t.Fatal(err)
		}
		if err := p.link.setAddresses(addrs[i : i+1]); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			l, err := net.Listen("tcp", addrs[0].Addr().String()+":0")
			if err != nil {
				t.Fatal(err)
			}
			listening <- l
			go func() {
				if c, err := l.Accept(); err == nil {
					accepted <- c
				}
			}()
		}
	}
	for i := range ends {
		go func() { _ = ends[i].tap.read(&wireTo{tap: ends[1-i].tap}) }()
	}
	l := <-listening
	port := netip.MustParseAddrPort(l.Addr().String())
	c, err := net.Dial("tcp", port.String()) // this thread is in the second namespace
	if err != nil {
		t.Fatal(err)
	}
	ends[0].conn, ends[1].conn = <-accepted, c
	const total = 8 << 20
	for i := range ends {
		done := make(chan int, 1)
		go func() {
			buf, n := make([]byte, 1<<16), 0
			for n < total {
				m, err := ends[1-i].conn.Read(buf)
				for j := range m {
					if buf[j] != byte((n+j)>>8) {
						t.Errorf("byte %d is wrong", n+j)
						break
					}
				}
				if n += m; err != nil {
					break
				}
			}
			done <- n
		}()
		data := make([]byte, total)
		for j := range data {
			data[j] = byte(j >> 8)
		}
		if _, err := ends[i].conn.Write(data); err != nil {
			t.Fatal(err)
		}
		if n := <-done; n != total {
			t.Errorf("%d of %d bytes arrived", n, total)
		}
	}
	for i := range ends {
		_ = ends[i].conn.Close()
		_ = ends[i].tap.close(t.Context())
	}
}

// wireTo is a node that hands frames to another TAP.
type wireTo struct {
	Node
	tap *tap
}

func (w *wireTo) WriteFrames(_ uint64, bufs [][]byte, sizes []int, offset int) (int, error) {
	frames := make([][]byte, len(bufs))
	for i := range bufs {
		frames[i] = bufs[i][offset : offset+sizes[i]]
	}
	w.tap.deliver(frames)
	return len(bufs), nil
}
