package ztnode

import (
	"errors"
	"fmt"
)

// MaxNetworks is how many networks a node can be in.
const MaxNetworks = 64

// Errors of a node that name a cause an operator can remedy.
var (
	ErrHomeUnusable        = errors.New("home directory unusable")
	ErrHomeInUse           = errors.New("home directory is in use by another process")
	ErrIdentityPermissions = errors.New("identity file can be read by others")
	ErrIdentityMismatch    = errors.New("identity files do not match")
	ErrIdentityInvalid     = errors.New("identity invalid")
	ErrPlanetInvalid       = errors.New("planet file invalid")
	ErrPortInUse           = errors.New("port is in use")
	ErrTooManyNetworks     = fmt.Errorf("%d networks are joined, and more are not possible: leave one first", MaxNetworks)
)
