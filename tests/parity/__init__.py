"""Drawn strategies, markets and accounts, played in both engines: do they order the same?"""
