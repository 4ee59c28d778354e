package ztnode

import "errors"

// Errors of a node that name a cause an operator can remedy.
var (
	ErrHomeUnusable        = errors.New("home directory unusable")
	ErrHomeInUse           = errors.New("home directory is in use by another process")
	ErrIdentityPermissions = errors.New("identity file can be read by others")
	ErrIdentityMismatch    = errors.New("identity files do not match")
	ErrIdentityInvalid     = errors.New("identity invalid")
	ErrPlanetInvalid       = errors.New("planet file invalid")
	ErrPortInUse           = errors.New("port is in use")
)
