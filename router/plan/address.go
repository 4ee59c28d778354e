package plan

import (
	"net/netip"

	"ztgate/internal/special"
)

// Unusable says why an address can never be a host's, whoever names it, as in "it is
// …". It returns "" for one that can. An address behind a translator (NAT64) is as good as
// the one that it stands for.
func Unusable(a netip.Addr) string {
	if !a.IsValid() || a.Zone() != "" {
		return "it is malformed"
	}
	a = a.Unmap()
	if why := never(single(a)); why != nil {
		return why.reason
	}
	if behind, ok := special.BehindNAT64(a); ok {
		return Unusable(behind)
	}
	return ""
}
