package control

import (
	"strconv"

	"ztgate/router/fault"
	"ztgate/zerotier/ztnode"
)

// Moons lists moons.
type Moons struct {
	Schema int           `json:"schema"`
	Moons  []ztnode.Moon `json:"moons"`
}

func ParseMoonID(s string) (uint64, error) {
	id, err := strconv.ParseUint(s, 16, 64)
	if err != nil || id == 0 {
		return 0, fault.Usagef("moon %q: want its ID, up to 16 hex digits, as in 8056c2e21c", s)
	}
	return id, nil
}
