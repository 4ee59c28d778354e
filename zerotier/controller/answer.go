package controller

import (
	"cmp"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl2"
)

const maxToken = 511

// loginData is the data of ERROR 0x09: version 0 without a page to log in at.
const loginData = "aV=0000000000000000\naU="

// answer decides about one request (chapter 04 §2).
func (c *Controller) answer(r request, now time.Time) {
	addr := r.from.Address()
	n := c.networks[r.network]
	switch {
	case n == nil && c.broken[r.network], n != nil && n.broken[addr]:
		c.stats.failed.Add(1) // the members keep what they have until it is repaired
		return
	case n == nil:
		c.refuse(addr, r, packet.ErrorObjectNotFound, nil)
		return
	}
	rec := newMember(r.network, addr, now.UnixMilli())
	m := n.members[addr]
	if m != nil {
		rec = m.rec.clone()
		if !m.pinnedTo(r.from) {
			c.refuse(addr, r, packet.ErrorNetworkAccessDenied, nil)
			if m.mismatch.IsZero() || now.Sub(m.mismatch) > time.Hour {
				m.mismatch = now
				c.log.Warn("node has the address of a member but another identity", "network", r.network, "member", addr)
			}
			return
		}
	}
	if rec.Identity == "" {
		rec.Identity = r.from.Public().String()
	}
	s := &session{identity: r.from, metadata: r.metadata, last: now}
	returned := true
	if m != nil && m.session != nil && now.Sub(m.session.last) < onlineFor {
		s.served, s.told = m.session.served, m.session.told
		returned = !s.served
	}
	m, code, err := c.serve(n, rec, s, r.id, now)
	if m != nil {
		m.session = s
		if err == nil {
			c.tell(n, m, code, now)
		}
	}
	switch {
	case err != nil:
		// No answer: the member asks again and keeps its configuration until then.
		c.stats.failed.Add(1)
		c.log.Error("answer configuration request", "network", r.network, "member", addr, "error", err)
	case code == packet.ErrorAuthenticationRequired:
		data := append([]byte{0, byte(len(loginData))}, loginData...)
		c.refuse(addr, r, code, data)
	case code != 0:
		c.refuse(addr, r, code, nil)
	case returned:
		c.resend(n, addr, now)
	}
}

// pinnedTo reports whether a record may be used by a node.
func (m *member) pinnedTo(id *identity.Identity) bool {
	if m.rec.Identity == "" {
		return true
	}
	if m.session != nil && m.session.identity.Equal(id) {
		return true
	}
	known, err := identity.Parse(m.rec.Identity)
	return err == nil && known.Equal(id)
}

// serve stores a record and sends the configuration: as reply to request id, or as
// push if that is 0. A code says why the member gets none; the record was stored then
// too, unless member is nil.
func (c *Controller) serve(n *network, rec Member, s *session, id packet.ID, now time.Time) (*member, packet.ErrorCode, error) {
	if n.members[rec.Address] == nil && len(n.members) >= maxMembers { // of a public network, say
		c.stats.overflow.Add(1)
		return nil, packet.ErrorNetworkAccessDenied, nil
	}
	n.rec.admit(&rec, s.metadata, now.UnixMilli())
	code := packet.ErrorCode(0)
	switch {
	case n.rec.SSOEnabled && !rec.SSOExempt && rec.AuthenticationExpiryTime <= now.UnixMilli():
		code = packet.ErrorAuthenticationRequired
	case !rec.Authorized:
		code = packet.ErrorNetworkAccessDenied
	}
	if code != 0 {
		if n.members[rec.Address] == nil && !rec.Authorized && !c.makeRoom(n) {
			return nil, code, nil
		}
		m, err := c.save(n, rec)
		return m, code, err
	}
	d := vl2.ParseDictionary(s.metadata)
	rec.VMajor, rec.VMinor, rec.VRev = version(d, "majv"), version(d, "minv"), version(d, "revv")
	rec.VProto = version(d, "pv")
	ts, err := c.timestamp(n, now)
	if err != nil {
		return nil, 0, err
	}
	cfg, err := c.build(n, &rec, s, ts)
	if err != nil {
		return nil, 0, err
	}
	m, err := c.save(n, rec) // first, so that an address is never given twice
	if err != nil {
		return nil, 0, err
	}
	if err := c.deliver(cfg, rec.Address, id); err != nil {
		return m, 0, err
	}
	s.served, s.sent = true, now
	c.gate.Lock()
	c.granted[memberKey{n.rec.ID, rec.Address}] = now
	c.gate.Unlock()
	return m, 0, nil
}

func version(d vl2.Dictionary, key string) int { return int(min(d.Integer(key, 0), 65535)) }

// admit authorises a member of a public network or with a token.
func (n *Network) admit(m *Member, metadata []byte, now int64) {
	if m.Authorized {
		return
	}
	if !n.Private {
		n.grant(m, "public", "", now)
		return
	}
	auth := vl2.ParseDictionary(metadata).Text("a")
	token, ok := strings.CutPrefix(auth[:min(len(auth), maxToken)], "token:")
	if !ok || token == "" {
		return
	}
	if expiry, ok := n.AuthTokens[token]; ok && (expiry == 0 || expiry > now) {
		n.grant(m, "token", token, now)
	}
}

// grant authorises. The default capabilities come with the first authorisation, not
// with the first request as in the reference (chapter 04 §4).
func (n *Network) grant(m *Member, by, credential string, now int64) {
	if m.LastAuthorizedTime == 0 {
		for _, x := range n.Capabilities {
			if x.Default && !slices.Contains(m.Capabilities, x.ID) {
				m.Capabilities = append(m.Capabilities, x.ID)
			}
		}
		slices.Sort(m.Capabilities)
	}
	m.Authorized, m.LastAuthorizedTime = true, now
	m.LastAuthorizedCredentialType, m.LastAuthorizedCredential = by, credential
}

// save stores a record if it changed.
func (c *Controller) save(n *network, rec Member) (*member, error) {
	m := n.members[rec.Address]
	var old Member
	if m != nil {
		old = m.rec
	}
	same := false
	if m != nil {
		var err error
		rec.Revision = old.Revision
		if same, err = equal(old, rec); err != nil {
			return nil, err
		}
	}
	if same {
		return m, nil
	}
	rec.Revision = old.Revision + 1
	if err := c.store.writeMember(&rec); err != nil {
		return nil, err
	}
	if rec.Authorized {
		n.forgive(rec.Address)
	}
	return n.put(rec), nil
}

// equal compares the stored forms. Records that are the same have the same, which is
// seen without making them.
func equal(a, b json.Marshaler) (bool, error) {
	if reflect.DeepEqual(a, b) {
		return true, nil
	}
	x, err := json.Marshal(a)
	if err != nil {
		return false, fmt.Errorf("encode record: %w", err)
	}
	y, err := json.Marshal(b)
	if err != nil {
		return false, fmt.Errorf("encode record: %w", err)
	}
	return string(x) == string(y), nil
}

// makeRoom forgets the oldest record of a node that nobody cared for when there are
// too many; false if there is no room.
func (c *Controller) makeRoom(n *network) bool {
	if n.strangers < maxUnauthorized {
		return true
	}
	var oldest *member
	for _, m := range n.members {
		if m.rec.stranger() && (oldest == nil || cmp.Or(cmp.Compare(m.rec.CreationTime, oldest.rec.CreationTime),
			cmp.Compare(m.rec.Address, oldest.rec.Address)) < 0) {
			oldest = m
		}
	}
	if oldest == nil {
		c.stats.overflow.Add(1)
		return false
	}
	c.stats.evicted.Add(1)
	// Not synced: it is no harm if the record comes back after a crash.
	if err := c.store.disk.Remove(c.store.memberPath(n.rec.ID, oldest.rec.Address)); err != nil {
		c.log.Error("remove record of an unauthorized node", "network", n.rec.ID, "error", err)
	}
	n.remove(oldest)
	return true
}

// refuse sends ERROR.
func (c *Controller) refuse(to identity.Address, r request, code packet.ErrorCode, data []byte) {
	c.stats.refused.Add(1)
	b := appendReply(nil, r.id)
	b = r.network.Append(append(b, byte(code)))
	c.send(to, packet.VerbError, append(b, data...), false)
}

// appendReply appends what OK and ERROR start with.
func appendReply(b []byte, id packet.ID) []byte {
	return vl2.NetworkID(id).Append(append(b, byte(packet.VerbNetworkConfigRequest)))
}

func (c *Controller) send(to identity.Address, v packet.Verb, payload []byte, compress bool) {
	c.out = append(c.out, message{to, v, payload, compress})
}

// deliver signs and sends a configuration (chapter 04 §6).
func (c *Controller) deliver(cfg *vl2.NetworkConfig, to identity.Address, id packet.ID) error {
	dict := cfg.Encode()
	if len(dict) > vl2.MaxConfigSent {
		return fmt.Errorf("configuration of %d bytes is too large", len(dict))
	}
	update := randomUint64()
	for update == 0 {
		update = randomUint64()
	}
	limit := 0
	if c.cfg.PacketLimit != nil {
		limit = c.cfg.PacketLimit(to)
	}
	chunks, err := vl2.AppendChunks(c.cfg.Identity, cfg.ID, dict, update, limit)
	if err != nil {
		return err
	}
	for _, b := range chunks {
		if id != 0 {
			c.send(to, packet.VerbOK, append(appendReply(nil, id), b...), true)
		} else {
			c.send(to, packet.VerbNetworkConfig, b, true)
		}
	}
	if id != 0 {
		c.stats.configs.Add(1)
	} else {
		c.stats.pushes.Add(1)
	}
	return nil
}

// changed queues a push to a member if it is online; at once before all others.
func (c *Controller) changed(m *member, now time.Time, atOnce bool) {
	if m.queued || !m.session.online(now) {
		return
	}
	m.queued = true
	key := memberKey{m.rec.Network, m.rec.Address}
	if atOnce {
		c.pushes = slices.Insert(c.pushes, 0, key)
	} else {
		c.pushes = append(c.pushes, key)
	}
	c.kick()
}

// push sends queued configurations, spread over time, and returns when to go on.
func (c *Controller) push(now time.Time) (next time.Time) {
	if len(c.pushes) == 0 {
		return now.Add(sweepInterval)
	}
	if d := now.Sub(c.lastPush); d >= 0 && d < pushInterval {
		return c.lastPush.Add(pushInterval)
	}
	batch := c.pushes[:min(len(c.pushes), pushBatch)]
	c.pushes = c.pushes[len(batch):]
	c.lastPush = now
	for _, key := range batch {
		n := c.networks[key.network]
		if n == nil {
			continue
		}
		m := n.members[key.address]
		if m == nil {
			continue
		}
		m.queued = false
		if m.session == nil {
			continue
		}
		_, code, err := c.serve(n, m.rec.clone(), m.session, 0, now)
		if err != nil {
			c.stats.failed.Add(1)
			c.log.Error("push configuration", "network", key.network, "member", key.address, "error", err)
			continue
		}
		c.tell(n, m, code, now)
	}
	return now.Add(pushInterval)
}
