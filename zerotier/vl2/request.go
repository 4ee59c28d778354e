package vl2

import (
	"crypto/sha512"
	"fmt"
	"runtime"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/wire"
	"ztgate/zerotier/packet"
)

// Bounds of requests and chunks (chapter 03 §1.4, §1.5).
const (
	MaxMetadata    = 1023
	MaxChunk       = 9640 // data bytes per packet that every receiver takes
	minChunk       = 1024
	maxUpdates     = 3
	maxChunks      = MaxConfig / minChunk
	updateLifetime = 30 * time.Second

	chunkSignatureType = 1
	flagPropagate      = 0x01
)

// RequestMetadata returns the dictionary that a request carries.
func RequestMetadata() []byte {
	w := &dictWriter{}
	for _, kv := range []struct {
		key string
		v   uint64
	}{
		{"v", configVersion}, {"vend", 1}, {"pv", packet.ProtocolVersion}, {"majv", 1}, {"minv", 16}, {"revv", 0},
		{"mr", MaxRules}, {"mc", MaxCapabilities}, {"mcr", maxCapabilityRules}, {"mt", MaxTags}, {"f", 0}, {"revr", 1},
	} {
		w.integer(kv.key, kv.v)
	}
	w.text("o", runtime.GOOS+"/"+runtime.GOARCH)
	return w.b
}

// AppendConfigRequest appends the payload of NETWORK_CONFIG_REQUEST.
func AppendConfigRequest(b []byte, n NetworkID, metadata []byte, revision uint64, timestamp int64) []byte {
	b = be.AppendUint16(n.Append(b), uint16(len(metadata)))
	b = append(b, metadata...)
	return be.AppendUint64(be.AppendUint64(b, revision), uint64(timestamp))
}

// ParseConfigRequest reads network and metadata of a request; metadata aliases b.
func ParseConfigRequest(b []byte) (n NetworkID, metadata []byte, err error) {
	r := reader{Reader: wire.Reader{Buf: b}}
	n = r.networkID()
	metadata = r.Bytes(int(r.U16()))
	if r.Failed {
		return 0, nil, fmt.Errorf("config request: %w", ErrMalformed)
	}
	return n, metadata[:min(len(metadata), MaxMetadata)], nil
}

// Chunk is one signed part of a configuration. It aliases the packet.
type Chunk struct {
	Network   NetworkID
	Data      []byte
	Flags     uint8
	UpdateID  uint64
	Total     int // length of the whole dictionary
	Index     int // where Data belongs
	Signature []byte
	signed    []byte
}

// ParseChunk reads a chunk: the payload of NETWORK_CONFIG, or what follows the
// reply fields of OK. Unsigned chunks are refused.
func ParseChunk(b []byte) (Chunk, error) {
	r := reader{Reader: wire.Reader{Buf: b}}
	c := Chunk{Network: r.networkID()}
	c.Data = r.Bytes(int(r.U16()))
	c.Flags = r.U8()
	c.UpdateID = r.U64()
	total, index := r.U32(), r.U32()
	c.signed = b[:r.Off]
	typ, n := r.U8(), r.U16()
	c.Signature = r.Bytes(int(n))
	switch {
	case r.Failed, typ != chunkSignatureType, n != identity.SignatureLen,
		total > MaxConfig, uint64(index)+uint64(len(c.Data)) > uint64(total), c.UpdateID == 0, len(c.Data) == 0:
		return Chunk{}, fmt.Errorf("config chunk: %w", ErrMalformed)
	}
	c.Total, c.Index = int(total), int(index)
	return c, nil
}

// Verify reports whether the controller signed the chunk.
func (c *Chunk) Verify(controller *identity.Identity) bool {
	return controller.Address() == c.Network.Controller() && controller.Verify(c.signed, c.Signature)
}

// FastPropagate reports whether members pass the chunk on.
func (c *Chunk) FastPropagate() bool { return c.Flags&flagPropagate != 0 }

// chunkOverhead is what a packet with a chunk has besides the chunk's data, at most: the
// header, the reply fields of OK, the chunk's own fields and its signature.
const chunkOverhead = packet.HeaderLen + 9 + 8 + 2 + 1 + 8 + 4 + 4 + 3 + identity.SignatureLen

// AppendChunks cuts a dictionary into signed chunks, one payload each, for packets of at
// most limit bytes; 0 = as every receiver takes them.
func AppendChunks(signer *identity.Identity, n NetworkID, dict []byte, updateID uint64, limit int) (payloads [][]byte, err error) {
	size := MaxChunk
	if limit > 0 {
		size = min(size, max(limit-chunkOverhead, minChunk))
	}
	for index := 0; index < len(dict); index += size {
		data := dict[index:min(index+size, len(dict))]
		b := be.AppendUint16(n.Append(nil), uint16(len(data)))
		b = append(append(b, data...), 0)
		b = be.AppendUint64(b, updateID)
		b = be.AppendUint32(b, uint32(len(dict)))
		b = be.AppendUint32(b, uint32(index))
		sig, err := signer.Sign(b)
		if err != nil {
			return nil, fmt.Errorf("sign configuration: %w", err)
		}
		b = be.AppendUint16(append(b, chunkSignatureType), identity.SignatureLen)
		payloads = append(payloads, append(b, sig[:]...))
	}
	return payloads, nil
}

// Assembler joins the chunks of up to three updates. The zero value is ready.
type Assembler struct {
	updates [maxUpdates]update
	uses    uint64
}

type update struct {
	id     uint64
	begun  time.Time
	used   uint64 // greater = more recently
	total  int
	got    int
	done   bool
	chunks map[int][]byte // by index
	digest map[[32]byte]bool
}

// Add adds a verified chunk. fresh is false for one seen before. dict is the
// whole dictionary once it is complete.
func (a *Assembler) Add(now time.Time, c Chunk) (dict []byte, fresh bool) {
	u := a.find(c, now)
	if u.done || u.total != c.Total || len(u.chunks) >= maxChunks {
		return nil, false
	}
	key := c.digest()
	if u.digest[key] {
		return nil, false
	}
	for index, data := range u.chunks {
		if c.Index < index+len(data) && index < c.Index+len(c.Data) {
			return nil, false // overlaps another one
		}
	}
	u.digest[key] = true
	u.chunks[c.Index] = append([]byte(nil), c.Data...)
	if u.got += len(c.Data); u.got < u.total {
		return nil, true
	}
	dict = make([]byte, u.total)
	for index, data := range u.chunks {
		copy(dict[index:], data)
	}
	u.done, u.chunks = true, nil // the ID stays, so that a replay isn't assembled again
	return dict, true
}

func (c *Chunk) digest() [32]byte {
	h := sha512.New512_256()
	h.Write(c.signed)
	h.Write(c.Signature)
	return [32]byte(h.Sum(nil))
}

// Knows reports whether exactly this chunk was added lately.
func (a *Assembler) Knows(now time.Time, c Chunk) bool {
	for i := range a.updates {
		if u := &a.updates[i]; u.id == c.UpdateID && now.Sub(u.begun) < updateLifetime {
			return u.digest[c.digest()]
		}
	}
	return false
}

func (a *Assembler) find(c Chunk, now time.Time) *update {
	a.uses++
	oldest := &a.updates[0]
	for i := range a.updates {
		u := &a.updates[i]
		if u.id == c.UpdateID && now.Sub(u.begun) < updateLifetime {
			u.used = a.uses
			return u
		}
		if u.used < oldest.used {
			oldest = u
		}
	}
	*oldest = update{
		id: c.UpdateID, begun: now, used: a.uses, total: c.Total,
		chunks: make(map[int][]byte), digest: make(map[[32]byte]bool),
	}
	return oldest
}

// Expire drops updates that were not completed in time.
func (a *Assembler) Expire(now time.Time) {
	for i := range a.updates {
		if now.Sub(a.updates[i].begun) >= updateLifetime {
			a.updates[i] = update{}
		}
	}
}

// ParseLogin reads the data of ERROR 0x09: where and how to log in (chapter 03 §1.6).
func ParseLogin(data []byte) (s SSO) {
	s = SSO{Enabled: true, Provider: "default"}
	if len(data) <= 2 {
		return s
	}
	n := min(int(be.Uint16(data)), len(data)-2)
	d := ParseDictionary(data[2 : 2+n])
	if s.Version = d.Integer("aV", 0); s.Version == 0 {
		s.AuthURL = cut(d.Text("aU"), 2047)
		return s
	}
	s.IssuerURL, s.CentralURL = cut(d.Text("iU"), 2047), cut(d.Text("aCU"), 2047)
	s.Nonce, s.State, s.ClientID = cut(d.Text("aN"), 63), cut(d.Text("aS"), 127), cut(d.Text("aCID"), 255)
	if p := cut(d.Text("aSSOp"), 63); p != "" {
		s.Provider = p
	}
	return s
}

// URL returns the address to show to somebody who shall log in, "" if there is none.
func (s SSO) URL() string {
	if s.AuthURL != "" {
		return s.AuthURL
	}
	return s.CentralURL
}
