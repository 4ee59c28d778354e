package network

import (
	"testing"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl2"
)

// Of many specialists only some are told groups, the replicators first.
func TestContactsAreBounded(t *testing.T) {
	cfg := &vl2.NetworkConfig{}
	for i := range vl2.MaxSpecialists {
		s := vl2.Specialist{Address: identity.Address(0x1000000000 + i), Roles: vl2.RoleRelay}
		if i%10 == 9 {
			s.Roles = vl2.RoleReplicator
		}
		cfg.Specialists = append(cfg.Specialists, s)
	}
	s := (&joined{l: &Layer{}}).newStateLocked(cfg, StatusOK, time.Time{})
	if len(s.contacts) != maxContactsTold {
		t.Fatalf("%d contacts", len(s.contacts))
	}
	for i, a := range s.contacts[:51] {
		if int(a-0x1000000000)%10 != 9 {
			t.Errorf("contact %d is %v", i, a)
		}
	}
}
