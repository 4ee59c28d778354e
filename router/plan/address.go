package plan

import "net/netip"

// Unusable says why an address can never be a host's, whoever names it, as in "it is
// …". It returns "" for one that can.
func Unusable(a netip.Addr) string {
	if !a.IsValid() || a.Zone() != "" {
		return "it is malformed"
	}
	if why := never(single(a.Unmap())); why != nil {
		return why.reason
	}
	return ""
}
