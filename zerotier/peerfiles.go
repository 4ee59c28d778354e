package zerotier

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"sync"
	"time"

	"ztgate/internal/atomicfile"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl1"
)

// maxPeerFiles bounds the peer cache on disk: what others cause there.
const maxPeerFiles = 4096

// peerFiles are the files of the peer cache, with the times at which they were written.
type peerFiles struct {
	mu   sync.Mutex
	m    map[identity.Address]time.Time
	most int
}

// oldest lists the peers, oldest first.
func (f *peerFiles) oldest() []identity.Address {
	return slices.SortedFunc(maps.Keys(f.m), func(a, b identity.Address) int {
		return cmp.Or(f.m[a].Compare(f.m[b]), cmp.Compare(a, b))
	})
}

// tidyPeers removes records that are too old, and the oldest of too many. One from the
// future, of a clock that was set back since, counts as written now.
func (s *store) tidyPeers(now time.Time) error {
	entries, err := s.Disk.ReadDir(s.Path("peers.d"))
	if err != nil {
		return fmt.Errorf("read peer cache: %w", err)
	}
	f := &s.cached
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.m)
	var errs []error
	for _, e := range entries {
		a, ok := vl1.ParsePeerFile(e.Name())
		if !ok {
			continue
		}
		fi, err := e.Info()
		if err != nil {
			continue
		}
		at := fi.ModTime()
		if at.After(now) {
			at = now
			errs = append(errs, s.Disk.Chtimes(s.Path("peers.d", e.Name()), now))
		}
		f.m[a] = at
		if now.Sub(at) >= vl1.PeerRecordLifetime {
			errs = append(errs, s.removePeerLocked(a))
		}
	}
	for _, a := range f.oldest()[:max(0, len(f.m)-f.most)] {
		errs = append(errs, s.removePeerLocked(a))
	}
	return errors.Join(errs...)
}

// removePeerLocked needs the lock of cached.
func (s *store) removePeerLocked(a identity.Address) error {
	delete(s.cached.m, a)
	if err := s.Disk.Remove(s.Path("peers.d", vl1.PeerFile(a))); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget peer %s: %w", a, err)
	}
	return nil
}

// peer looks a peer up in the cache (chapter 02 §4.11); nil if it isn't there.
func (s *store) peer(a identity.Address) *vl1.PeerRecord {
	b, err := s.Disk.ReadFile(s.Path("peers.d", vl1.PeerFile(a)))
	if err != nil {
		return nil
	}
	r, err := vl1.ParsePeerRecord(b)
	if err != nil || r.Identity.Address() != a {
		return nil
	}
	return r
}

// peers lists the newest records of the peer cache, of at most so many peers.
func (s *store) peers(most int) []identity.Address {
	f := &s.cached
	f.mu.Lock()
	defer f.mu.Unlock()
	list := f.oldest()
	slices.Reverse(list)
	return list[:min(len(list), most)]
}

// storePeer keeps the endpoints of an older record if a peer has none any more: they may
// do again. The oldest record makes room for a new one.
func (s *store) storePeer(r vl1.PeerRecord, now time.Time) error {
	a := r.Identity.Address()
	if len(r.Endpoints) == 0 {
		if old := s.peer(a); old != nil {
			r.Endpoints = old.Endpoints
		}
	}
	f := &s.cached
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.m[a]; !ok && len(f.m) >= f.most {
		if err := s.removePeerLocked(f.oldest()[0]); err != nil {
			return err
		}
	}
	if err := atomicfile.WriteOn(s.Disk, s.Path("peers.d", vl1.PeerFile(a)), r.Append(nil), 0o600); err != nil {
		return err
	}
	f.m[a] = now
	return nil
}
